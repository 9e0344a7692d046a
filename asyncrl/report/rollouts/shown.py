r"""Rollouts as text for a terminal or a file: the prompt, and the completion with its tokens in colours.

What a model said is data: nothing of it reaches the terminal as a control. Control characters, marks that reverse the
direction of writing and the like are shown as \x1b, \u202e; lines of prompt and completion begin with a bar, so that
none of them can pass for a line of this program.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from asyncrl.host.printing import printable
from asyncrl.report.rollouts.records import RolloutRecord
from asyncrl.types import LeaseKind

T = TypeVar("T")

BAR = "  \u2502 "
RESET = "\x1b[0m"
BOLD = "\x1b[1m"
DIM = "\x1b[2m"

_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need, and that move nothing
_VERSION_COLOURS = (153, 223, 151, 218, 183, 230, 116, 180)
# Backgrounds from a bound on, none below the first: |log-prob difference| in nats, and |advantage|.
_MISMATCHES = ((0.02, 230), (0.1, 222), (0.5, 215), (1.0, 203))
_ADVANTAGES = ((1e-9, (194, 224)), (0.5, (157, 217)), (1.5, (120, 210)))


class Colour(StrEnum):
    """What the colour of a token says."""

    VERSION = "version"  # which policy version sampled it
    MISMATCH = "mismatch"  # how far the trainer's log-prob is from that of the rollout engine
    ADVANTAGE = "advantage"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Painter:
    """Paints tokens by `colour`; `is_on` says whether escape codes may be written at all."""

    colour: Colour
    is_on: bool
    versions: Sequence[int] = ()  # of all rollouts that are shown

    def backgrounds(self, record: RolloutRecord) -> list[int | None]:
        """The background of each token, of 256 colours; None for a plain one."""
        plain: list[int | None] = [None] * len(record.token_ids)
        if not self.is_on:
            return plain
        match self.colour:
            case Colour.VERSION:
                return [self._of_version(version) for version in record.token_versions]
            case Colour.MISMATCH if record.mismatches is not None:
                return [_from(_MISMATCHES, abs(value)) for value in record.mismatches]
            case Colour.ADVANTAGE if record.advantages is not None:
                signed = [(value, _from(_ADVANTAGES, abs(value))) for value in record.advantages]
                return [None if pair is None else pair[value < 0] for value, pair in signed]
        return plain

    def legend(self) -> str:
        """What the colours say, in one line; empty without colours."""
        if not self.is_on or self.colour is Colour.NONE:
            return ""
        if self.colour is Colour.VERSION:
            parts = [self.painted(f" {version} ", self._of_version(version)) for version in self.versions]
            return f"colour: the policy version that sampled a token {' '.join(parts)}"
        if self.colour is Colour.MISMATCH:
            parts = [self.painted(f" {bound:g} ", background) for bound, background in _MISMATCHES]
            return f"colour: |trainer's log-prob - engine's| in nats, from {' '.join(parts)} on; lower is plain"
        parts = [
            self.painted(f" {sign}{'0' if bound < 1e-3 else f'{bound:g}'} ", pair[sign == "-"])
            for sign in "+-"
            for bound, pair in _ADVANTAGES
        ]
        return f"colour: the advantage, beyond {' '.join(parts)}; 0 is plain"

    def painted(self, text: str, background: int | None) -> str:
        """Black text on a background; plain where there is none."""
        if background is None or not self.is_on or not text:
            return text
        return f"\x1b[38;5;16;48;5;{background}m{text}{RESET}"

    def marked(self, text: str, code: str) -> str:
        """Text in bold or dim."""
        return f"{code}{text}{RESET}" if self.is_on else text

    def _of_version(self, version: int) -> int:
        place = self.versions.index(version) if version in self.versions else version
        return _VERSION_COLOURS[place % len(_VERSION_COLOURS)]


def shown(records: Sequence[RolloutRecord], colour: Colour, *, with_colours: bool) -> Iterator[str]:
    """The lines to print, without line ends."""
    versions = sorted({version for record in records for version in record.token_versions})
    painter = Painter(colour, with_colours, versions)
    if legend := painter.legend():
        yield legend
        yield ""
    for record in records:
        yield from _one(record, painter)
        yield ""


def harmless(text: str) -> str:
    """`text` with everything escaped that a terminal would obey; line ends, tabs and letters of all scripts stay."""
    if text.isprintable():
        return text
    return "".join(map(_harmless, text))


def _harmless(char: str) -> str:
    if char.isprintable() or char in "\n\t" or char in _JOINERS or unicodedata.category(char) == "Zs":
        return char
    return char.encode("unicode_escape").decode()


def _one(record: RolloutRecord, painter: Painter) -> Iterator[str]:
    of = "step" if record.kind is LeaseKind.TRAIN else "evaluation of version"
    parts = ", ".join(f"{printable(name)} {value:g}" for name, value in record.reward_parts.items())
    title = f"{of} {record.version}  prompt {record.ordinal}  rollout {record.place}  {record.why}"
    reward = f"reward {record.reward:g}{f' ({parts})' if parts else ''}"
    advantage = "" if record.advantage is None else f"  advantage {record.advantage:+.3g}"
    yield f"{painter.marked(title, BOLD)}  {reward}{advantage}"
    yield from (painter.marked(line, DIM) for line in _details(record))
    yield "prompt"
    prompt = _ids(record.prompt_ids) if record.prompt is None else record.prompt
    yield from _barred([(prompt, None)], painter)
    yield "completion"
    if record.token_texts is not None:
        yield from _barred(list(zip(record.token_texts, painter.backgrounds(record), strict=True)), painter)
    elif record.completion is not None:
        yield from _barred([(record.completion, None)], painter)
    else:
        yield from _barred([(_ids(record.token_ids), None)], painter)
    if record.payload is not None:
        yield f"payload {json.dumps(record.payload)}"


def _details(record: RolloutRecord) -> Iterator[str]:
    """What the colours say, in figures: for those who see none."""
    end = "cut off" if record.truncated else "ended by itself"
    spans = ", ".join(f"[{span.start}, {span.stop}) {span.version}" for span in record.versions)
    attempt = f"  attempt {record.attempt}" if record.attempt else ""
    generator = "" if record.generator is None else f"  generator {printable(record.generator)}"
    yield f"  {len(record.token_ids)} tokens, {end}  versions of tokens {spans}{attempt}{generator}"
    differences = record.mismatches
    if differences:
        sizes = [abs(value) for value in differences]
        worst = sizes.index(max(sizes))
        token = "" if record.token_texts is None else f" {json.dumps(record.token_texts[worst])}"
        yield (
            f"  log-prob mismatch mean {sum(sizes) / len(sizes):.3g}, largest {sizes[worst]:.3g} nats at token {worst}"
            f"{token}"
        )
    elif record.kind is LeaseKind.TRAIN:
        yield "  no log-probs of the trainer: nothing of it was trained on, for its group had equal rewards"


def _barred(parts: Sequence[tuple[str, int | None]], painter: Painter) -> Iterator[str]:
    """Parts of one text, each with its background, as lines that begin with a bar."""
    line = BAR
    for text, background in parts:
        first, *rest = harmless(text).split("\n")
        line += painter.painted(first, background)
        for further in rest:
            yield line
            line = BAR + painter.painted(further, background)
    yield line


def _ids(token_ids: Sequence[int]) -> str:
    return f"(no text) {' '.join(map(str, token_ids))}"


def _from(steps: Sequence[tuple[float, T]], value: float) -> T | None:
    """What belongs to the last bound that `value` reaches."""
    reached = [what for bound, what in steps if value >= bound]
    return reached[-1] if reached else None


def printable_in(encoding: str | None) -> Callable[[str], str]:
    """Makes lines that a stream of this encoding can take: what it cannot express is escaped."""
    name = encoding or "ascii"
    return lambda line: line.encode(name, "backslashreplace").decode(name)

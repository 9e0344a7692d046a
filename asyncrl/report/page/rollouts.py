"""What the model said: some rollouts of a run, token by token, in colors for version, mismatch or advantage.

The newest step and evaluation that were written, and the first step beside them; of each the best, the worst and some
others. `asyncrl rollouts` shows all of them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from asyncrl.report.page.markup import Html, joined, markup
from asyncrl.report.rollouts.files import ROLLOUTS_FOLDER, RolloutFile, files_in, read_file
from asyncrl.report.rollouts.records import RolloutRecord
from asyncrl.report.rollouts.selection import Wanted, select
from asyncrl.report.rollouts.shown import harmless
from asyncrl.types import LeaseKind

SHOWN = Wanted(best=2, worst=2, sample=1)  # of each file
MAX_TOKENS = 1000  # of one completion; what is behind them is counted
MAX_CHARACTERS = 4000  # of one prompt
VERSION_COLORS = 8
# Where a level of color begins, none below the first.
MISMATCHES = (0.02, 0.1, 0.5, 1.0)  # |log-prob difference| in nats
ADVANTAGES = (1e-9, 0.5, 1.5)
OVERLAYS = {
    "version": "policy version that sampled a token",
    "mismatch": "how far the trainer's log-prob is from the engine's",
    "advantage": "advantage: above and below 0",
    "none": "no colors",
}


def rollouts_of(run_dir: Path) -> list[Html]:
    """The articles of the section; none where the run wrote no rollouts."""
    articles = [_switch()]
    for file in _chosen(files_in(run_dir / ROLLOUTS_FOLDER)):
        try:
            records, problems = read_file(file)
        except FileNotFoundError:  # the run has deleted it meanwhile, to make room
            continue
        if problems:
            articles.append(markup("<p>{}</p>", f"{len(problems)} lines of {file.path.name} cannot be read"))
        shown = select(records, SHOWN) if records else []
        versions = sorted({version for record in shown for version in record.token_versions})
        articles += [_article(record, versions) for record in shown]
    return articles if len(articles) > 1 else []


def _chosen(files: Sequence[RolloutFile]) -> list[RolloutFile]:
    """The newest step, the newest evaluation, and the first step where that is another one."""
    steps = [file for file in files if file.kind is LeaseKind.TRAIN]
    evaluations = [file for file in files if file.kind is LeaseKind.EVAL]
    return [*steps[-1:], *evaluations[-1:], *steps[:-1][:1]]


def _switch() -> Html:
    choices = joined(
        markup(
            '<label title="{}"><input type="radio" name="overlay" id="o-{}"{}> {}</label>',
            told,
            name,
            Html(" checked") if name == "version" else Html(),
            name,
        )
        for name, told in OVERLAYS.items()
    )
    return markup(
        '<fieldset class="switch"><legend class="hidden">Colors of tokens</legend>{}</fieldset>'
        '<p class="legend-line">version: each in a color; mismatch: from {} nats on; '
        "advantage: green above 0, red below</p>",
        choices,
        ", ".join(f"{bound:g}" for bound in MISMATCHES),
    )


def _article(record: RolloutRecord, versions: Sequence[int]) -> Html:
    of = "step" if record.kind is LeaseKind.TRAIN else "evaluation of version"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in record.reward_parts.items())
    title = f"{of} {record.version}, prompt {record.ordinal}, rollout {record.place}: {record.why}"
    facts = [f"reward {record.reward:.3g}{f' ({parts})' if parts else ''}"]
    if record.advantage is not None:
        facts.append(f"advantage {record.advantage:+.3g}")
    facts.append(f"{len(record.token_ids):,} tokens, {'cut off' if record.truncated else 'ended by itself'}")
    if record.mismatches:
        sizes = [abs(value) for value in record.mismatches]
        facts.append(f"mismatch mean {sum(sizes) / len(sizes):.2g}, largest {max(sizes):.2g} nats")
    chips = (
        markup('<span class="{}">{}</span>', _version_class(version, versions), f" {version} ")
        for version in sorted(set(record.token_versions))
    )
    return markup(
        '<article class="rollout"><h3>{}</h3><p>{}; versions {}</p>'
        '<pre class="prompt" role="group" aria-label="prompt" tabindex="0">{}</pre>'
        '<pre role="group" aria-label="completion" tabindex="0">{}</pre></article>',
        title,
        "; ".join(facts),
        joined(chips),
        _text(_cut(record.prompt)),
        joined(_tokens(record, versions)),
    )


def _tokens(record: RolloutRecord, versions: Sequence[int]) -> Iterable[Html]:
    """The completion; tokens in a row that look the same are one piece."""
    if record.token_texts is None:
        yield _text(_cut(record.completion))
        return
    classes = _classes(record, versions)
    pieces = list(zip(record.token_texts, classes, strict=True))[:MAX_TOKENS]
    for name, run in groupby(pieces, lambda piece: piece[1]):
        yield markup('<span class="{}">{}</span>', name, _text("".join(text for text, _ in run)))
    if len(record.token_texts) > MAX_TOKENS:
        yield markup("<i>{}</i>", f" … and {len(record.token_texts) - MAX_TOKENS:,} more tokens")


def _classes(record: RolloutRecord, versions: Sequence[int]) -> list[str]:
    """What page.css colors of each token: v0 to v7, m1 to m4, p1 to p3 and n1 to n3."""
    names = [[_version_class(version, versions)] for version in record.token_versions]
    for name, value in zip(names, record.mismatches or (), strict=False):
        if level := sum(abs(value) >= bound for bound in MISMATCHES):
            name.append(f"m{level}")
    for name, value in zip(names, record.advantages or (), strict=False):
        if level := sum(abs(value) >= bound for bound in ADVANTAGES):
            name.append(f"{'n' if value < 0 else 'p'}{level}")
    return [" ".join(name) for name in names]


def _version_class(version: int, versions: Sequence[int]) -> str:
    return f"v{versions.index(version) % VERSION_COLORS}"


def _text(text: str) -> Html:
    """A text of a run as markup: its line ends and letters of all scripts stay, what would act is shown escaped."""
    return Html(html.escape(harmless(text)))


def _cut(text: str | None) -> str:
    if text is None:
        return "(no text: the tokenizer failed)"
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"

"""The timeline of weight syncs: a lane for each generator, a bar for each round that it took part in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from asyncrl.report.page.drawing import AXES, WIDE, Axes, drawing, horizontal_ticks, key_of, marks_of, nested
from asyncrl.report.page.markup import Html, joined, markup, shown
from asyncrl.report.run_records import SyncRecord, middle

MAX_LANES = 24
LANE_HEIGHT = 20  # pixels
LANE = 100  # units of a drawing
SLOT = 5  # units: rounds that begin in the same slot are one bar
LEAST_WIDE = 4


class RoundEnd(IntEnum):
    """How a round ended; the worst of several is shown."""

    COMMITTED = 0
    CAUGHT_UP = 1
    IN_PART = 2
    FAILED = 3


TOLD = {
    RoundEnd.COMMITTED: "committed",
    RoundEnd.CAUGHT_UP: "committed, caught up",
    RoundEnd.IN_PART: "some of its generators failed",
    RoundEnd.FAILED: "nobody committed",
}


@dataclass(slots=True)
class Lane:
    """The rounds of one generator, or of those that have no lane of their own."""

    name: str
    rounds: list[SyncRecord] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Rounds that did not go well for all."""
        return sum(end_of(sync) >= RoundEnd.IN_PART for sync in self.rounds)


def end_of(sync: SyncRecord) -> RoundEnd:
    """How a round ended. Which of its members failed is not recorded."""
    if not sync.generators_committed:
        return RoundEnd.FAILED
    if sync.generators_failed:
        return RoundEnd.IN_PART
    return RoundEnd.CAUGHT_UP if sync.catch_up else RoundEnd.COMMITTED


def lanes_of(syncs: Sequence[SyncRecord]) -> list[Lane]:
    """A lane for each generator in the order of names; of many those with most failures, and one for all others."""
    lanes: dict[str, Lane] = {}
    for sync in syncs:
        for name in sync.members:
            lanes.setdefault(name, Lane(name)).rounds.append(sync)
    if len(lanes) <= MAX_LANES:
        return sorted(lanes.values(), key=lambda lane: _natural(lane.name))
    worst = sorted(lanes.values(), key=lambda lane: (-lane.failed, _natural(lane.name)))
    chosen, rest = worst[: MAX_LANES - 1], worst[MAX_LANES - 1 :]
    others = {id(sync): sync for lane in rest for sync in lane.rounds}
    return [*chosen, Lane(f"{len(rest)} others", list(others.values()))]


def timeline(syncs: Sequence[SyncRecord], axes: Axes) -> Html:
    """The timeline as a figure of the page; nothing where no round was made."""
    lanes = lanes_of(syncs)
    if not lanes:
        return Html()
    high = LANE * len(lanes)
    drawn = [nested(axis, joined([marks_of(axes, axis, high), *_bars(lanes, axes, axis)]), high) for axis in AXES]
    names = [
        markup('<text x="100%" y="{}">{}</text>', f"{100 * (place + 0.5) / len(lanes):.4g}%", _short(lane.name))
        for place, lane in enumerate(lanes)
    ]
    ends = sorted({end_of(sync) for lane in lanes for sync in lane.rounds})
    legend = [markup("<li>{}<span>{}</span></li>", key_of(f"end{end:d}", "round"), TOLD[end]) for end in ends]
    return markup(
        '<figure class="chart wide lanes" id="rounds"><figcaption><h3>Rounds of weight sync</h3><p>by generator; a bar '
        'is as long as its round took</p></figcaption><div class="plot">{}{}{}</div><ul class="legend">{}</ul>{}'
        "</figure>\n",
        markup('<svg class="ys" height="{}" aria-hidden="true">{}</svg>', LANE_HEIGHT * len(lanes), joined(names)),
        drawing(_in_words(lanes), joined(drawn), LANE_HEIGHT * len(lanes)),
        horizontal_ticks(axes),
        joined(legend),
        _table(lanes),
    )


def _bars(lanes: Sequence[Lane], axes: Axes, axis: str) -> Iterable[Html]:
    for place, lane in enumerate(lanes):
        middle_of_lane = LANE * place + LANE // 2
        by_end: dict[RoundEnd, list[str]] = {}
        for (left, right), end in _slots(lane.rounds, axes, axis).values():
            by_end.setdefault(end, []).append(f"M{left},{middle_of_lane}H{right}")
        for end, bars in sorted(by_end.items()):
            yield markup('<path class="line round end{}" d="{}"/>', int(end), "".join(bars))


def _slots(rounds: Sequence[SyncRecord], axes: Axes, axis: str) -> Mapping[int, tuple[tuple[int, int], RoundEnd]]:
    """Where bars begin and end, and the worst end of the rounds of each, by slot."""
    slots: dict[int, tuple[tuple[int, int], RoundEnd]] = {}
    for sync in rounds:
        if axis == "step":
            begin, finish = float(sync.version), sync.version + 0.7
        else:
            finish = sync.wall_s or 0.0
            begin = finish - (sync.total_ms or 0.0) / 1000
        left = min(axes.place(axis, begin), WIDE - LEAST_WIDE)
        right = max(axes.place(axis, finish), left + LEAST_WIDE)
        slot = left // SLOT
        if slot in slots:
            (known_left, known_right), end = slots[slot]
            slots[slot] = (min(left, known_left), max(right, known_right)), max(end, end_of(sync))
        else:
            slots[slot] = (left, right), end_of(sync)
    return slots


def _in_words(lanes: Sequence[Lane]) -> str:
    failed = [f"{lane.name} {lane.failed} of {len(lane.rounds)}" for lane in lanes if lane.failed]
    return (
        f"Rounds of weight sync of {len(lanes)} generators; failed, in part or for all: {', '.join(failed) or 'none'}."
    )


def _table(lanes: Sequence[Lane]) -> Html:
    rows = []
    for lane in lanes:
        times = [sync.total_ms for sync in lane.rounds]
        cells = (
            len(lane.rounds),
            lane.failed,
            shown(middle(times), ",.0f"),
            shown(max((time for time in times if time is not None), default=None), ",.0f"),
            shown(middle(sync.pause_ms for sync in lane.rounds), ",.1f"),
        )
        tds = joined(markup("<td>{}</td>", cell) for cell in cells)
        rows.append(markup('<tr><th scope="row">{}</th>{}</tr>', lane.name, tds))
    names = ("rounds", "failed", "median ms", "slowest ms", "median pause ms")
    return markup(
        '<details id="rounds-table"><summary>Table<span class="hidden"> of rounds</span></summary>'
        '<div class="scroll" role="group" aria-label="Table of rounds" tabindex="0"><table>'
        "<thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div></details>",
        joined(markup('<th scope="col">{}</th>', name) for name in names),
        joined(rows),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts generator-10 behind generator-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:7]}…{name[-8:]}"

"""Whether one cell of the fault matrix met its bar: figures in, complaints out. No processes, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from asyncrl.transport.limits import DEAD_S

SLACK_S = 2.0  # the bar: survivors commit within the deadline and this
MIN_STEPS = 2
# Leases of a silent generator go back after DEAD_S, and no batch may overtake them by more than staleness.max_age: that
# long a standstill is by design. What is longer is not.
STEPS_S = DEAD_S + 5.0

Event = dict[str, Any]  # {"event", "at", ...}, see `benchmarks.faulty_generator`
Key = tuple[int, int]  # (ordinal, attempt) of a group


@dataclass(slots=True)
class Seen:
    """What was seen of one cell. Times are those of one monotonic clock."""

    fault: str
    phase: str
    sick: str
    timeout_s: float
    events: dict[str, list[Event]]  # of each generator that takes part
    version: int | None = None  # of the sync that the fault happened to; None = the fault did not happen
    fault_at: float = 0.0
    resumed_at: float | None = None  # SIGCONT, or the start of a replacement; None = it recovers by itself
    learner_said: str = ""  # why the learner left the sick one out of that sync; empty = it did not
    steps: list[tuple[float, int]] = field(default_factory=list)  # when each version was first seen in the metrics
    trainer_starts: int = 1
    learner_running: bool = True

    @property
    def survivors(self) -> list[str]:
        return sorted(set(self.events) - {self.sick})

    @property
    def learner_had_decided(self) -> bool:
        """The fault happened to the commit, so the version was proven: the learner may send another one."""
        return self.phase == "COMMIT" and self.fault != "canary"

    @property
    def back_at(self) -> float | None:
        """When the sick one, or its replacement, first committed in a sync, or by a commit, from after the fault."""
        begun = False
        for event in self.events[self.sick]:
            if event["at"] > max(self.fault_at, self.resumed_at or 0.0):
                begun = begun or event["event"] in (("offer", "commit") if self.learner_had_decided else ("offer",))
                if begun and _is_commit(event):
                    return event["at"]
        return None

    @property
    def standstill_s(self) -> float:
        """The longest time without a step, from the fault to the second step after the sick one was back."""
        steps = [at for at, _ in self.steps]
        later = [at for at in steps if at > (self.back_at or self.fault_at)]
        end = later[1] if len(later) > 1 else float("inf")
        ends = [self.fault_at, *(at for at in steps if self.fault_at < at <= end)]
        return max((after - before for before, after in pairwise(ends)), default=0.0)

    def steps_between(self, since: float, until: float = float("inf")) -> int:
        return sum(since < at <= until for at, _ in self.steps)


def complaints(seen: Seen) -> list[str]:
    """What keeps a cell from having passed; empty = passed. What was trained on is judged at the end: `tainted`."""
    if seen.version is None:
        return ["the fault did not happen: the cell says nothing"]
    return [
        *_committed_on_the_sick_one(seen),
        *_late_survivors(seen),
        *_standstill(seen),
        *([] if seen.back_at is not None else [f"{seen.sick} did not come back to a committed version"]),
        *([] if seen.learner_running else ["the learner ended"]),
        *([] if seen.trainer_starts == 1 else [f"the trainer was started {seen.trainer_starts} times"]),
    ]


def _is_commit(event: Event) -> bool:
    return event["event"] == "held" and event["version"] is not None


def _rest_of_that_sync(seen: Seen) -> Iterator[Event]:
    """The sick one's events after the fault, up to its next sync or its next life."""
    for event in seen.events[seen.sick]:
        if event["at"] > seen.fault_at:
            if event["event"] in ("offer", "started"):
                return
            yield event


def _committed_on_the_sick_one(seen: Seen) -> list[str]:
    found, told_again = [], False
    for event in _rest_of_that_sync(seen):
        if event["event"] == "commit":
            told_again = True
            if not seen.learner_had_decided:
                found.append(f"the learner told {seen.sick} to commit version {event['version']}")
        if _is_commit(event) and not (seen.learner_had_decided and (told_again or _late(seen, event))):
            found.append(f"{seen.sick} committed version {event['version']} in the sync with the fault")
    if not seen.learner_had_decided and not seen.learner_said:
        found.append(f"the learner did not notice that {seen.sick} failed in the sync to version {seen.version}")
    return found


def _late(seen: Seen, event: Event) -> bool:
    """The commit that it was stopped in the middle of takes effect when it goes on."""
    return seen.fault == "stop" and event["at"] > (seen.resumed_at or float("inf"))


def survivor_delays(seen: Seen) -> dict[str, float | None]:
    """Seconds from the fault to a commit of that version or a newer one, by survivor; 0 if it was first, None if never.

    A snapshot that was replaced between two attempts never comes: the newer version takes its place.
    """
    assert seen.version is not None
    delays: dict[str, float | None] = {}
    for name in seen.survivors:
        held = [e["at"] for e in seen.events[name] if _is_commit(e) and e["version"] >= seen.version]
        delays[name] = max(0.0, min(held) - seen.fault_at) if held else None
    return delays


def _late_survivors(seen: Seen) -> list[str]:
    limit_s = seen.timeout_s + SLACK_S
    return [
        f"{name} committed version {seen.version} "
        + ("never" if delay is None else f"{delay:.1f} s after the fault, allowed {limit_s:g}")
        for name, delay in survivor_delays(seen).items()
        if delay is None or delay > limit_s
    ]


def _standstill(seen: Seen) -> list[str]:
    """With survivors steps go on while one is out; without, they go on once it is back."""
    if seen.survivors:
        limit = seen.fault_at + STEPS_S
        count = seen.steps_between(seen.fault_at, min(limit, seen.resumed_at or limit))
        words = f"within {limit - seen.fault_at:g} s of the fault, while {seen.sick} was out"
    else:
        count = 0 if seen.back_at is None else seen.steps_between(seen.back_at)
        words = f"after {seen.sick} was back"
    return [] if count >= MIN_STEPS else [f"{count} steps {words}"]


# -- what was trained on -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainedGroup:
    """A group that a step was taken with."""

    key: Key
    generator: str
    incarnation: int
    versions: frozenset[int]


def proofs(events: Mapping[str, Iterable[Event]]) -> set[tuple[str, int, int]]:
    """(generator, incarnation, version) of every commit."""
    found = set()
    for name, lines in events.items():
        incarnation = 0
        for event in lines:
            if event["event"] == "started":
                incarnation = event["incarnation"]
            elif _is_commit(event):
                found.add((name, incarnation, event["version"]))
    return found


def tainted(trained: Iterable[TrainedGroup], events: Mapping[str, list[Event]]) -> dict[tuple[str, int], str]:
    """(generator, version) → why a token of that version should not have been trained on.

    Either that life of the generator never committed the version, or the group was begun under weights that were called
    by its number and were found wrong: a later, good sync to the same number does not make those tokens good.
    """
    proven, begun_too_early = proofs(events), {}
    for lines in events.values():
        for event in lines:
            if event["event"] == "tainted group" and event["key"][0] == "train":
                begun_too_early[tuple(event["key"][1:])] = event["versions"]
    found = {}
    for group in trained:
        for version in group.versions:
            if (group.generator, group.incarnation, version) not in proven:
                who = f"{group.generator} (incarnation {group.incarnation})"
                found[group.generator, version] = (
                    f"trained on group {group.key} with tokens of version {version}, which {who} never committed"
                )
        for version in begun_too_early.get(group.key, ()):
            found[group.generator, version] = (
                f"trained on group {group.key}, begun under weights of version {version} that were found wrong"
            )
    return found

"""The two runs of the churn benchmark: one in which something happens every few seconds, one in which nothing does."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.churn_account import DOWN, OUT, READY, STARTING
from benchmarks.faults.churn_observer import GENERATORS, Observer, Trace
from benchmarks.faults.fleet import Fleet, FleetError

START_TIMEOUT_S = 300.0
PHASES = ("one", "one, a second starts", "two, a third starts", "three")


class Interrupt:
    """SIGINT and SIGTERM as a flag, so that what was measured until then is still written."""

    def __init__(self) -> None:
        self.received = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name


class Disturber:
    """Picks what happens next, seeded. An empty place is filled sooner than a further one is emptied.

    Leave, kill and stop come in shuffled threes, so that even a short run has some of each.
    """

    def __init__(self, seed: int, every_s: tuple[float, float], stop_s: tuple[float, float]) -> None:
        self._random = random.Random(seed)
        self._every_s, self._stop_s = every_s, stop_s
        self._bag: list[str] = []

    def next_in_s(self) -> float:
        return self._random.uniform(*self._every_s)

    def pick(self, states: dict[str, str]) -> tuple[str, str, float]:
        """(kind, generator, seconds of a stop), by the state of each generator."""
        chance, place, length = (self._random.random() for _ in range(3))
        up = [name for name, state in states.items() if state != DOWN]
        willing = [name for name, state in states.items() if state in (STARTING, READY, OUT)]
        down = [name for name, state in states.items() if state == DOWN]
        if chance < 4 * len(down) / (4 * len(down) + 1) or not up:
            kind, names = "join", down
        else:
            if not self._bag:
                self._bag = self._random.sample(["kill", "leave", "stop"], 3)
            kind = self._bag.pop() if willing else "kill"  # one that is stopped or leaves can only be killed
            names = up if kind == "kill" else willing
        low, high = self._stop_s
        return kind, names[int(place * len(names))], low + (high - low) * length


@contextlib.contextmanager
def observed(folder: Path, config: Path, settings: list[str]) -> Iterator[Observer]:
    """A fleet with its learner started; what goes wrong in the body is noted in the trace, not raised."""
    with Fleet(folder, config, settings) as fleet:
        fleet.start_learner()
        observer = Observer(fleet, folder / "journal")
        try:
            yield observer
        except FleetError as error:
            observer.trace.error = str(error)
        try:
            observer.finish()
        except FleetError as error:
            observer.trace.error = observer.trace.error or str(error)


def disturbed_run(
    folder: Path, config: Path, settings: list[str], interrupt: Interrupt, *, disturber: Disturber, seconds: float
) -> Trace:
    """Three generators start; when all are ready something happens to one of them every few seconds."""
    with observed(folder, config, settings) as observer:
        for name in GENERATORS:
            observer.join(name)
        observer.wait_until(
            lambda: len(observer.in_state(READY)) == len(GENERATORS) or bool(interrupt.received),
            START_TIMEOUT_S,
            "three generators",
        )
        observer.trace.events.clear()
        observer.begin("churn")
        end, due = observer.now + seconds, observer.now + disturber.next_in_s()
        while observer.now < end and not interrupt.received:
            observer.continue_due()
            if observer.now >= due:
                due += disturber.next_in_s()
                _disturb(observer, disturber)
            observer.tick()
        observer.end_phase()
    return observer.trace


def _disturb(observer: Observer, disturber: Disturber) -> None:
    kind, name, stop_s = disturber.pick({g.name: g.state for g in observer.generators.values()})
    match kind:
        case "join":
            observer.join(name)
        case "leave":
            observer.leave(name)
        case "kill":
            observer.kill(name)
        case "stop":
            observer.stop(name, stop_s)
    number = len(observer.trace.events)
    print(f"{observer.now:7.1f} s  event {number}: {kind} {name}, version {observer.fleet.version()}", flush=True)


def calm_run(
    folder: Path,
    config: Path,
    settings: list[str],
    interrupt: Interrupt,
    *,
    num_steps: int,
    phase_s: float,
    limit_s: float,
) -> Trace:
    """The same without disturbance, until it has as many steps; on the way, what one and what three generators make.

    First one generator alone for `phase_s`; then one, and after that two, while another one starts, which costs them
    CPU time and cache; then all three, for `phase_s` at least. PHASES are their names.
    """
    with observed(folder, config, settings) as observer:

        def stay(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
            observer.wait_until(lambda: condition() or bool(interrupt.received), timeout_s, what)

        observer.join(GENERATORS[0])
        stay(lambda: observer.fleet.version() >= 2, START_TIMEOUT_S, "version 2")
        observer.begin(PHASES[0])
        end = observer.now + phase_s
        stay(lambda: observer.now >= end, 2 * phase_s + 60, "the first phase")
        for number, phase in ((2, PHASES[1]), (3, PHASES[2])):
            observer.begin(phase)
            observer.join(GENERATORS[number - 1])
            stay(lambda n=number: len(observer.in_state(READY)) == n, START_TIMEOUT_S, f"{number} generators")
        observer.begin(PHASES[3])
        end = observer.now + phase_s
        stay(lambda: observer.now >= end and observer.fleet.version() >= num_steps, limit_s, f"version {num_steps}")
        observer.end_phase()
    return observer.trace

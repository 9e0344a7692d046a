"""What an observer sees of a run with three generators: who is alive, since when, and what the machine gave it.

What counts as alive is what the learner counts: a generator is READY from the moment its log says that a version is
proven (the learner has compared digests and canary by then) until it is stopped, told to leave or killed, or the
learner's log says that its leases went back. What it may be trained on is judged by the learner's commits alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.faults.churn_account import DOWN, LEAVING, OUT, READY, STARTING, STOPPED, Offer
from benchmarks.faults.commits import Commit, CommitLog
from benchmarks.faults.fleet import LEARNER, Fleet, FleetError, marked_processes

GENERATORS = ("g0", "g1", "g2")
TICK_S = 0.1
LOOK_EVERY_S = 1.0  # for new processes, new journal segments
WATCH_EVERY_S = 5.0
STOP_TIMEOUT_S = 60.0
ENGINE = "VLLM::EngineCor"  # the name that vLLM gives its process, as /proc cuts it
PROVEN = " is proven"
ENGINE_READY = "INFO engine ready after"
RELEASED = re.compile(r"WARNING generator (\S+) .*leases go back")


@dataclass(slots=True)
class Generator:
    """What is known of one name."""

    name: str
    stopped_until: float | None = None
    leaving: bool = False
    holds: bool = False  # has proven a version, and the learner counts it
    has_held: bool = False
    engine: int | None = None  # pid
    state: str = DOWN
    ended: bool = True  # its end was seen
    expected_end: bool = False
    schedstat: tuple[float, float] | None = None
    waiting_since: float | None = None  # its engine is up, and it has no proven version


@dataclass(slots=True)
class Trace:
    """All that was seen of a run. Times are seconds since its first step could be taken."""

    changes: list[tuple[float, str, str]] = field(default_factory=list)  # (t, generator, its state from then on)
    events: list[tuple[float, str, str, float | None]] = field(default_factory=list)  # (t, kind, generator, seconds)
    steps: list[dict[str, Any]] = field(default_factory=list)
    syncs: list[dict[str, Any]] = field(default_factory=list)
    commits: dict[Commit, int] = field(default_factory=dict)  # of the learner, see `benchmarks.faults.commits`
    own_ends: list[str] = field(default_factory=list)  # generators that ended though nobody had asked them to
    starts_s: list[float] = field(default_factory=list)  # from the command to the first proven version
    waits_s: list[float] = field(default_factory=list)  # from an engine that is up to a proven version, or to its end
    others: list[float] = field(default_factory=list)  # share of the CPUs that others had, 5 s at a time
    offers: dict[str, Offer] = field(default_factory=dict)  # by phase of the run
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    learner_starts: int = 0
    trainer_starts: int = 0
    learner_exit: int | None = None
    error: str = ""


class Observer:
    """Follows one fleet, tick by tick. Owns the trace."""

    def __init__(self, fleet: Fleet, kept_journal: Path) -> None:
        self.fleet = fleet
        self.trace = Trace()
        self.generators = {name: Generator(name) for name in GENERATORS}
        self._kept = kept_journal
        self._kept.mkdir(parents=True, exist_ok=True)
        self._zero = self._last = self._looked = time.monotonic()
        self._clock_offset: float | None = None  # of the learner's wall_s to our time
        self._raw_steps = 0
        self._phase: str | None = None
        self._seen: dict[str, int] = {}  # lines of each log
        self._commit_log = CommitLog()
        self._watching: contextlib.ExitStack | None = None
        self._watch: common.Watch | None = None

    @property
    def now(self) -> float:
        return time.monotonic() - self._zero

    def in_state(self, *states: str) -> list[str]:
        return [g.name for g in self.generators.values() if g.state in states]

    def begin(self, phase: str) -> None:
        """From now on what is offered counts for `phase`."""
        self.end_phase()
        self._phase = phase
        self.trace.offers[phase] = Offer()
        self.trace.phases[phase] = (self.now, self.now)

    def end_phase(self) -> None:
        if self._phase is not None:
            self.trace.phases[self._phase] = (self.trace.phases[self._phase][0], self.now)
            self._phase = None

    def tick(self) -> None:
        """Looks at everything once."""
        time.sleep(TICK_S)
        instant = time.monotonic()
        seconds, self._last = instant - self._last, instant
        self._read_logs()
        look = instant - self._looked >= LOOK_EVERY_S
        if look:
            self._looked = instant
            self.keep_journal()
            self._watch_others()
        parts = [self._account(generator, look) for generator in self.generators.values()]
        if self._phase is not None:
            self.trace.offers[self._phase].add(seconds, parts)
        for generator in self.generators.values():
            self._settle(generator)
        self._read_metrics()
        if not self.fleet.running(LEARNER):
            raise FleetError(f"the learner ended with code {self.fleet.members[LEARNER].process.returncode}")

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise FleetError(f"not within {timeout_s:.0f} s: {what}\n{self.fleet.tails()}")
            self.tick()

    # -- doing something to a generator

    def join(self, name: str) -> None:
        self._read_logs()  # the last words of the incarnation before
        self.fleet.start_generator(name)
        generator = self.generators[name] = Generator(name, ended=False, state=self.generators[name].state)
        self._change(generator, STARTING)
        self._event("join", name)

    def leave(self, name: str) -> None:
        generator = self.generators[name]
        generator.leaving = generator.expected_end = True
        self.fleet.members[name].process.send_signal(signal.SIGTERM)
        self._event("leave", name)

    def kill(self, name: str) -> None:
        generator = self.generators[name]
        generator.expected_end = True
        self._event("kill", name)
        self.fleet.kill9(name)
        generator.stopped_until = None

    def stop(self, name: str, seconds: float) -> None:
        generator = self.generators[name]
        generator.stopped_until = self.now + seconds
        self._event("stop", name, seconds)
        self.fleet.stop(name)

    def continue_due(self) -> None:
        for generator in self.generators.values():
            if generator.stopped_until is not None and self.now >= generator.stopped_until:
                self.fleet.cont(generator.name)
                generator.stopped_until = None

    def _event(self, kind: str, name: str, seconds: float | None = None) -> None:
        self.trace.events.append((round(self.now, 2), kind, name, seconds))

    # -- looking

    def _read_logs(self) -> None:
        for line in self._new_lines(LEARNER):
            if found := RELEASED.search(line):
                self.generators[found[1]].holds = False
            self.trace.learner_starts += "INFO listening on" in line
            self.trace.trainer_starts += "INFO trainer started" in line
        for name, generator in self.generators.items():
            for line in self._new_lines(name):
                if ENGINE_READY in line:
                    generator.waiting_since = self.now
                elif PROVEN in line:
                    if not generator.holds and generator.state == STARTING:
                        self.trace.starts_s.append(time.monotonic() - self.fleet.members[name].started_at)
                    generator.holds = generator.has_held = True
                    self._end_wait(generator)

    def _end_wait(self, generator: Generator) -> None:
        if generator.waiting_since is not None:
            self.trace.waits_s.append(self.now - generator.waiting_since)
            generator.waiting_since = None

    def _new_lines(self, name: str) -> list[str]:
        if name not in self.fleet.members:
            return []
        lines, seen = self.fleet.log(name), self._seen.get(name, 0)
        self._seen[name] = len(lines)
        return lines[seen:]

    def _account(self, generator: Generator, look: bool) -> tuple[str, float, float]:
        """(state, CPU time, wait for a CPU) of its engine since the last tick."""
        if generator.state == DOWN:
            return DOWN, 0.0, 0.0
        if generator.engine is None and look:
            generator.engine = _engine_of(self.fleet.members[generator.name].mark)
        before, generator.schedstat = generator.schedstat, _schedstat(generator.engine)
        if before is None or generator.schedstat is None:
            return generator.state, 0.0, 0.0
        cpu_s, waited_s = (now - then for now, then in zip(generator.schedstat, before, strict=True))
        return generator.state, cpu_s, waited_s

    def _settle(self, generator: Generator) -> None:
        """Its state by now."""
        running = self.fleet.running(generator.name)
        if not running and not generator.ended:
            generator.ended, generator.holds = True, False
            code = self.fleet.members[generator.name].process.returncode
            if not generator.expected_end or (generator.leaving and code not in (0, -signal.SIGKILL)):
                self.trace.own_ends.append(f"{generator.name} after {self.now:.0f} s, exit code {code}")
        if not running:
            state = DOWN
        elif generator.stopped_until is not None:
            state = STOPPED
        elif generator.leaving:
            state = LEAVING
        elif generator.holds:
            state = READY
        else:
            state = OUT if generator.has_held else STARTING
        self._change(generator, state)

    def _change(self, generator: Generator, state: str) -> None:
        if state in (STOPPED, LEAVING, DOWN):
            self._end_wait(generator)
        elif state == OUT and generator.waiting_since is None:
            generator.waiting_since = self.now
        if state != generator.state:
            generator.state = state
            self.trace.changes.append((round(self.now, 2), generator.name, state))

    def _read_metrics(self) -> None:
        steps = self.fleet.records("step")
        self._commit_log.look(self.fleet.version(), self.fleet.log())
        self.trace.commits = self._commit_log.commits
        fresh = steps[self._raw_steps :]
        self._raw_steps = len(steps)
        for record in fresh:
            offset = self.now - record["wall_s"]  # too large by what it took us to look: the smallest is the best
            self._clock_offset = offset if self._clock_offset is None else min(offset, self._clock_offset)
        self.trace.steps += fresh
        self.trace.syncs = self.fleet.records("sync")

    def keep_journal(self) -> None:
        """A second name for every segment: the learner deletes those that a checkpoint has made needless."""
        for path in (self.fleet.run_dir / "journal").glob("*.segment"):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(path, self._kept / path.name)

    def _watch_others(self) -> None:
        if self._watch is not None and time.perf_counter() - self._watch.started < WATCH_EVERY_S:
            return
        self.end_watch()
        self._watching = contextlib.ExitStack()
        self._watch = self._watching.enter_context(common.watch())

    def end_watch(self) -> None:
        if self._watching is not None and self._watch is not None:
            self._watching.close()
            self.trace.others.append(self._watch.others_share)
            self._watching = self._watch = None

    def finish(self) -> Trace:
        """Ends the run in an orderly way, and sets the clock of its records to ours."""
        self.end_phase()
        self.end_watch()
        self.keep_journal()
        if self.fleet.running(LEARNER):
            self.trace.learner_exit = self.fleet.terminate(LEARNER, STOP_TIMEOUT_S)
        self.trace.learner_exit = self.fleet.members[LEARNER].process.returncode
        self.keep_journal()
        self._read_logs()
        self._read_metrics()
        for record in [*self.trace.steps, *self.trace.syncs]:
            record["t"] = record["wall_s"] + (self._clock_offset or 0.0)
        return self.trace


def _engine_of(mark: str) -> int | None:
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == ENGINE:
                return pid
    return None


def _schedstat(pid: int | None) -> tuple[float, float] | None:
    """(CPU time, time ready to run without a CPU) of the main thread, which runs the model; seconds since its start."""
    if pid is None:
        return None
    try:
        cpu_ns, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except OSError:
        return None
    return int(cpu_ns) / 1e9, int(waited_ns) / 1e9

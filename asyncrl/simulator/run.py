"""A run as a sequence of events: leases, completions, results, steps, weight syncs. No model, no socket, no clock.

What decides who may work on what and when a batch is taken is the learner's own code: `replay.lease_book`,
`replay.buffer` and `replay.pacing`. What takes time (`simulator.model`) is drawn. Start-up, failures and restarts are
not part of it: a run is simulated from the moment when every generator holds version 0.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.lease_records import LeaseRecord
from asyncrl.replay.pacing import Pacing
from asyncrl.simulator.decoding import SimulatedEngine, SimulatedGroup
from asyncrl.simulator.model import Service, SharedCores, Sizes
from asyncrl.simulator.outcome import SimulatedOutcome, SimulatedStep, outcome, warm_up_steps
from asyncrl.storage.records import StoredGroup
from asyncrl.types import LeaseKind

BACKLOG_SHARE = 0.25  # as `generator.held_leases`: leases that wait behind a full engine
CELL_GRACE_S = 1.0  # as `weights.plan.planner`: how long a slow cell keeps the others from a newer snapshot
TURNS_AT_ONCE = 64  # generators that are looked at for a lease in one turn, as `desk.generators`
NEVER_S = 1e15  # no lease expires

Event = Callable[[float], None]


@dataclass(slots=True)
class _Cell:
    """Generators that take each version together. Only those with sequences (`active`) notice a swap.

    While a round is at work, swap_at, next_version and pause_s say when it swaps in what, and for how long its engines
    stand still; a swap that nobody notices is no event.
    """

    members: range
    held: int = 0  # proven
    sampling: int = 0
    at_work: bool = False
    active: set[int] = field(default_factory=set)
    swap_at: float = 0.0
    next_version: int = 0
    pause_s: float = 0.0
    swap_foreseen: bool = False


class SimulatedRun:
    """One run; `run` may be called once. Equal arguments give equal runs.

    shared: the cores that learner and generators share; None where each has its own. keep_batches: `steps` say on which
    groups they were.
    """

    def __init__(
        self,
        sizes: Sizes,
        service: Service,
        *,
        shared: SharedCores | None = None,
        seed: int = 0,
        keep_batches: bool = False,
    ) -> None:
        sizes.check()
        self._keep_batches = keep_batches
        self._sizes = sizes
        self._service = service
        self._shared = shared
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, Event]] = []
        self._order = count()
        pacing = Pacing(sizes.groups_per_step, sizes.max_age, sizes.steps)
        self._leases = LeaseBook(pacing, NEVER_S)
        self._buffer = ReplayBuffer(pacing)
        self._groups: dict[int, SimulatedGroup] = {}  # by ordinal, in the buffer or in training
        self._engines = [
            SimulatedEngine(sizes.max_sequences, service.decode_s, service.decode_sequence_s, service.new_sequence_s)
            for _ in range(sizes.generators)
        ]
        self._cells = [
            _Cell(range(first, min(first + sizes.cell_size, sizes.generators)))
            for first in range(0, sizes.generators, sizes.cell_size)
        ]
        self._capacity = int(sizes.max_sequences * (1 + BACKLOG_SHARE) + 0.999)
        self._on_their_way = [0] * sizes.generators  # sequences of granted leases
        self._wanting: dict[int, None] = dict.fromkeys(range(sizes.generators))  # in the order of their turns
        self._foreseen = [-1] * sizes.generators  # the stamp of the engine's end that is among the events
        self._trained = 0
        self._published = 0
        self._newest_held = 0
        self._cells_at_work = 0
        self._refused_at = -1  # no lease is allowed at this version or an older one, until a result or a step comes
        self._first_commit_of = 0  # the newest version that a cell holds
        self._snapshot_wanted = True
        self._in_step: list[StoredGroup] = []
        self._work_left = 0.0
        self._work_at = 0.0
        self._work_stamp = 0
        self._in_snapshot = False
        self._in_checkpoint = False
        self._checkpoint_due = False
        self._checkpoint_began_at = 0.0
        self._writes_checkpoint = False
        self._eval_due = False
        self._evaluates = False
        self._step_began_at = 0.0
        self._waiting_since: float | None = 0.0
        self._waited_s = 0.0
        self._snapshots_s = 0.0  # while it waited, and for checkpoints
        self._pace = 1.0
        self._steps: list[SimulatedStep] = []
        self._tokens_by_age: dict[int, int] = {}
        self._generated_tokens = 0
        self._evaluated_tokens = 0

    def run(self) -> SimulatedOutcome:
        """Simulates all steps."""
        self._turn(0.0)
        while self._trained < self._sizes.steps:
            assert self._events, "a run that is not over waits for something"
            now, _, event = heapq.heappop(self._events)
            event(now)
        end = self._steps[-1].at
        for engine in self._engines:
            engine.advance(end)
        return outcome(
            self._steps,
            self._tokens_by_age,
            busy_s=sum(engine.busy_s for engine in self._engines),
            generators=self._sizes.generators,
            generated_tokens=self._generated_tokens,
            evaluated_tokens=self._evaluated_tokens,
        )

    @property
    def steps(self) -> list[SimulatedStep]:
        """Those that were made."""
        return self._steps

    # -- events ----------------------------------------------------------------------------------------------------

    def _at(self, when: float, event: Event) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _turn(self, now: float) -> None:
        """What the learner does whenever something changed."""
        self._decide(now)
        self._grant(now)
        self._adjust_pace(now)

    def _adjust_pace(self, now: float) -> None:
        """Cores that are shared go slower or faster for all when one begins or ends to work."""
        if self._shared is None:
            return
        working = sum(engine.works for engine in self._engines)
        pace = self._shared.pace(
            learner_works=bool(self._in_step) or self._in_checkpoint,
            generators_working=working,
            writers=int(self._writes_checkpoint),
        )
        if pace == self._pace:
            return
        self._advance_work(now)
        self._pace = pace
        self._foresee_step(now)
        for place, engine in enumerate(self._engines):
            engine.set_pace(pace, now)
            self._foresee_end(place)

    # -- leases ----------------------------------------------------------------------------------------------------

    def _grant(self, now: float) -> None:
        self._refused_at = -1
        if not self._wanting:
            return
        if not self._evaluates and not self._leases.may_grant(self._trained):
            self._refused_at = self._trained
            return
        refused_at = -1
        for place in [place for _, place in zip(range(TURNS_AT_ONCE), self._wanting, strict=False)]:
            held = self._cell_of(place).held
            # An evaluation's leases are for one version alone, whatever the rule says of newer ones.
            if (held > refused_at or self._evaluates) and not self._grant_to(place, held, now):
                refused_at = max(refused_at, held)
            if refused_at >= self._newest_held and not self._evaluates:
                self._refused_at = refused_at
                return

    def _grant_to(self, place: int, held: int, now: float) -> bool:
        """Grants to one generator until it has no room; False when the learner's rule allows no more at `held`."""
        del self._wanting[place]
        while self._room(place) > 0:
            records = self._leases.grant(str(place), held, 1, self._trained, now)
            if not records:
                self._wanting[place] = None  # behind all others
                return False
            group = SimulatedGroup(records[0], self._sequences_of(records[0]))
            self._on_their_way[place] += group.left
            self._at(now + self._service.grant_s, partial(self._lease_arrived, place, group))
        return True

    def _sequences_of(self, lease: LeaseRecord) -> int:
        return self._sizes.eval_samples if lease.key.kind is LeaseKind.EVAL else self._sizes.group_size

    def _room(self, place: int) -> int:
        return self._capacity - self._engines[place].sequences_left - self._on_their_way[place]

    def _lease_arrived(self, place: int, group: SimulatedGroup, now: float) -> None:
        engine, cell = self._engines[place], self._cell_of(place)
        if cell.at_work and now >= cell.swap_at:
            cell.sampling = cell.next_version
        elif cell.at_work:
            self._foresee_swap(cell)
        engine.begin_at(cell.sampling, now)
        cell.active.add(place)
        self._on_their_way[place] -= group.left
        draw = self._service.completion_tokens.draw
        engine.add(group, [max(1, round(draw(self._rng))) for _ in range(group.left)], now)
        self._adjust_pace(now)
        self._foresee_end(place)

    def _cell_of(self, place: int) -> _Cell:
        return self._cells[place // self._sizes.cell_size]

    # -- engines ---------------------------------------------------------------------------------------------------

    def _foresee_end(self, place: int) -> None:
        """Puts the engine's next end among the events, once for each stamp."""
        engine = self._engines[place]
        end = engine.next_end()
        if end is not None and self._foreseen[place] != engine.stamp:
            self._foreseen[place] = engine.stamp
            self._at(end, partial(self._sequence_ended, place, engine.stamp))

    def _sequence_ended(self, place: int, stamp: int, now: float) -> None:
        engine = self._engines[place]
        if engine.stamp != stamp:
            return  # something changed since it was foreseen
        for group in engine.take_ended(now):
            self._generated_tokens += sum(group.lengths)
            self._at(now + self._service.reward_s.draw(self._rng), partial(self._result, group))
        if not engine.sequences_left:
            self._cell_of(place).active.discard(place)
        if self._room(place) > 0:
            self._wanting[place] = None
        self._grant(now)
        self._adjust_pace(now)
        self._foresee_end(place)

    def _result(self, group: SimulatedGroup, now: float) -> None:
        lease = group.lease
        self._leases.accept(lease.key, lease.holder, now)
        if lease.key.kind is LeaseKind.EVAL:
            self._evaluated_tokens += sum(group.lengths)
            self._evaluates = self._leases.eval_is_running
            for cell in [self._cell_of(int(lease.holder))] if self._evaluates else self._cells:
                self._begin_round(cell, now)
            self._turn(now)
            return
        self._groups[lease.key.ordinal] = group
        stored = StoredGroup(
            generator_id=lease.holder,
            incarnation=1,
            seq=1,
            ordinal=lease.key.ordinal,
            attempt=lease.key.attempt,
            issued_version=lease.issued_version,
            oldest_version=min(group.tokens_by_version),
            newest_version=max(group.tokens_by_version),
            num_tokens=tuple(group.lengths),
            body=b"",
        )
        self._buffer.add(stored)
        self._turn(now)

    # -- learner ---------------------------------------------------------------------------------------------------

    def _decide(self, now: float) -> None:
        """Begins the next step when its batch is there."""
        if self._in_step or self._in_snapshot or self._in_checkpoint or self._trained >= self._sizes.steps:
            return
        for dropped in self._buffer.drop_over_age(self._trained):
            self._leases.drop(dropped.key, now)
            del self._groups[dropped.ordinal]
        if not self._buffer.can_take(self._trained, self._leases.running_by_version):
            return
        assert self._waiting_since is not None
        self._waited_s = now - self._waiting_since - self._snapshots_s
        self._waiting_since, self._snapshots_s = None, 0.0
        self._in_step = self._buffer.take(self._trained)
        self._leases.train(group.key for group in self._in_step)
        tokens = sum(sum(group.num_tokens) for group in self._in_step)
        self._work_left = self._service.step_s.draw(self._rng) + self._service.step_token_s * tokens
        self._work_at = self._step_began_at = now
        self._foresee_step(now)

    def _foresee_step(self, now: float) -> None:
        if self._in_step:
            self._work_stamp += 1
            self._at(now + self._work_left / self._pace, partial(self._step_ended, self._work_stamp))

    def _advance_work(self, now: float) -> None:
        if self._in_step:
            self._work_left -= (now - self._work_at) * self._pace
            self._work_at = now

    def _step_ended(self, stamp: int, now: float) -> None:
        if stamp != self._work_stamp:
            return
        self._count_step(now)
        self._in_step = []
        self._trained += 1
        self._waiting_since = now
        sizes = self._sizes
        self._eval_due |= bool(sizes.eval_prompts and sizes.eval_every) and self._trained % sizes.eval_every == 0
        self._checkpoint_due |= bool(sizes.checkpoint_every) and self._trained % sizes.checkpoint_every == 0
        self._snapshot_if_wanted(now)
        self._checkpoint_if_due(now)
        self._turn(now)

    def _count_step(self, now: float) -> None:
        counts = len(self._steps) >= warm_up_steps(self._sizes.steps)
        tokens = age_sum = age_max = oldest_age_max = 0
        for stored in self._in_step:
            group = self._groups.pop(stored.ordinal)
            oldest_age_max = max(oldest_age_max, self._trained - stored.oldest_version)
            for version, number in group.tokens_by_version.items():
                age = self._trained - version
                tokens += number
                age_sum += age * number
                age_max = max(age_max, age)
                if counts:
                    self._tokens_by_age[age] = self._tokens_by_age.get(age, 0) + number
        step_s = now - self._step_began_at
        ordinals = tuple(stored.ordinal for stored in self._in_step) if self._keep_batches else ()
        self._steps.append(
            SimulatedStep(now, tokens, age_sum, age_max, oldest_age_max, step_s, self._waited_s, ordinals)
        )

    # -- weights ---------------------------------------------------------------------------------------------------

    def _snapshot_if_wanted(self, now: float) -> None:
        """A version goes out between two steps, or while the learner waits for a batch."""
        due = self._snapshot_wanted and self._published < self._trained
        if due and not self._in_step and not self._in_snapshot and not self._in_checkpoint:
            self._in_snapshot, self._snapshot_wanted = True, False
            snapshot_s = self._service.snapshot_s.draw(self._rng)
            self._snapshots_s += snapshot_s
            self._at(now + snapshot_s, self._snapshot_made)

    def _snapshot_made(self, now: float) -> None:
        self._in_snapshot = False
        self._published = self._trained
        for cell in self._cells:
            self._begin_round(cell, now)
        self._checkpoint_if_due(now)
        self._turn(now)

    def _begin_round(self, cell: _Cell, now: float) -> None:
        if cell.at_work or cell.held >= self._published or self._holds_for_evaluation(cell):
            return
        cell.at_work, cell.swap_foreseen = True, False
        self._cells_at_work += 1
        draw = self._rng
        cell.swap_at = now + self._service.stage_s.draw(draw)
        cell.next_version, cell.pause_s = self._published, self._service.pause_s.draw(draw)
        if cell.active:
            self._foresee_swap(cell)
        committed_at = cell.swap_at + cell.pause_s + self._service.commit_s.draw(draw)
        self._at(committed_at, partial(self._commit, cell, self._published))

    def _foresee_swap(self, cell: _Cell) -> None:
        if not cell.swap_foreseen:
            cell.swap_foreseen = True
            self._at(cell.swap_at, partial(self._swap, cell, cell.next_version))

    def _swap(self, cell: _Cell, version: int, now: float) -> None:
        cell.sampling = version
        for place in cell.active:
            self._engines[place].swap(version, now)
        self._adjust_pace(now)
        self._at(now + cell.pause_s, partial(self._resume, cell, list(cell.active)))

    def _resume(self, cell: _Cell, paused: list[int], now: float) -> None:
        for place in paused:
            self._engines[place].resume(now)
        self._adjust_pace(now)
        for place in paused:
            self._foresee_end(place)

    def _commit(self, cell: _Cell, version: int, now: float) -> None:
        cell.held, cell.at_work = version, False
        cell.sampling = version
        self._newest_held = max(self._newest_held, version)
        self._cells_at_work -= 1
        self._begin_evaluation(version, now)
        if not self._cells_at_work:
            self._want_snapshot(version, now)
        elif version > self._first_commit_of:
            self._first_commit_of = version
            self._at(now + CELL_GRACE_S, partial(self._want_snapshot, version))
        self._begin_round(cell, now)  # it was late, and a newer version is there
        if version > self._refused_at:  # else the rule allows no more, as it did when it was asked last
            self._grant(now)
            self._adjust_pace(now)

    def _want_snapshot(self, version: int, now: float) -> None:
        """Asks for a snapshot newer than `version`, once."""
        if version == self._published and not self._snapshot_wanted:
            self._snapshot_wanted = True
            self._snapshot_if_wanted(now)

    # -- evaluations and checkpoints ---------------------------------------------------------------------------------

    def _begin_evaluation(self, version: int, now: float) -> None:
        """One that is due begins with the next version that a cell proves, as `desk.evaluation`."""
        if self._eval_due and not self._evaluates:
            self._eval_due, self._evaluates = False, True
            self._leases.start_eval(version, self._sizes.eval_prompts, NEVER_S, now)
            self._wanting = dict.fromkeys(place for place in range(self._sizes.generators) if self._room(place) > 0)

    def _holds_for_evaluation(self, cell: _Cell) -> bool:
        """Whether a generator of this cell must keep its version for the evaluation that runs."""
        if not self._evaluates:
            return False
        held: dict[str, int | None] = {str(place): cell.held for place in cell.members}
        return not self._leases.eval_holders(held).isdisjoint(held)

    def _checkpoint_if_due(self, now: float) -> None:
        """Training stands still for it between two steps; one at a time."""
        at_rest = not self._in_step and not self._in_snapshot and not self._in_checkpoint
        if self._checkpoint_due and at_rest and not self._writes_checkpoint:
            self._checkpoint_due, self._in_checkpoint = False, True
            self._checkpoint_began_at = now
            self._at(now + self._service.checkpoint_s.draw(self._rng), self._checkpoint_begun)

    def _checkpoint_begun(self, now: float) -> None:
        self._in_checkpoint, self._writes_checkpoint = False, True
        self._snapshots_s += now - self._checkpoint_began_at
        self._at(now + self._service.checkpoint_write_s.draw(self._rng), self._checkpoint_written)
        self._snapshot_if_wanted(now)
        self._turn(now)

    def _checkpoint_written(self, now: float) -> None:
        self._writes_checkpoint = False
        self._checkpoint_if_due(now)
        self._adjust_pace(now)

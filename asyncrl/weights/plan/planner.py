"""Which generator holds which policy version, and how it gets the next one: decisions without sockets or clock.

Every generator is a *receiver*. Receivers share weight channels in *cells* (at most `weights.cell_size` of them), and
each cell takes a new snapshot in a *round* of its own (`weights.plan.round`), so that a receiver that hangs can stall
its cell and nobody else:

- When a snapshot comes, every idle cell starts a round with it. A cell whose members stay the same uses its channel
  again; a store prefix is never used twice, so a changed or broken cell gets a new channel.
- A receiver that never proved a version is *caught up* beside the cells' rounds, on a channel that it shares with at
  most a cell's size of other newcomers; one whose last round failed is caught up alone. When it has proved a version it
  is merged into a cell at the next snapshot; while evaluations keep all cells from swapping, it goes on like this.
- A newer snapshot is asked for when no cell is at work, or CELL_GRACE_S after the first one was done: slow cells cost
  the others no more than that. Cells that are late take the newest snapshot when they are done. The request is
  repeated until a newer snapshot comes, and names the channels in use, so that a lost message costs seconds.

The beat of a generator tells what it holds. When that is not what it proved here, the commit was lost and is said
again; when it stays so, the generator counts as holding nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from asyncrl.link.messages import SyncCommit, SyncReply
from asyncrl.link.trainer_messages import BroadcastDone, ChannelReady, CloseChannel, SnapshotReady, SnapshotWanted
from asyncrl.link.weight_records import Placement
from asyncrl.weights.plan.backends import BackendRefused, backend_for, fit_together
from asyncrl.weights.plan.cells import plan_cells
from asyncrl.weights.plan.records import (
    Cell,
    OpenedChannel,
    Output,
    Phase,
    Receiver,
    SyncRules,
    ToGenerator,
    ToPublisher,
    Unreachable,
)
from asyncrl.weights.plan.round import SyncRound

log = logging.getLogger(__name__)

CELL_GRACE_S = 1.0
MAX_CATCH_UPS = 4  # rounds at once: they share the learner's network with the cells
COMMIT_REPEAT_S = 3.0  # a beat from before the commit may still be on its way
WANTED_REPEAT_S = 3.0
REOPEN_S = 1.0  # after the publisher could not open a channel: it would fail again at once


class SyncPlanner:
    """Decides what publisher and generators do next; the desk carries the messages.

    Every input takes `now` (monotonic seconds) and appends to outputs, which the desk drains with `take_outputs`.

    Args:
        run_epoch: told in every message, so that replies to an earlier learner are known as such.
        run_name: begins the names of channels.
        timeout_s: bounds each phase of a round.
        tolerance: largest difference of a canary's log-probs, in nats.
        cell_size: most generators of one cell.
        gpu_tolerance: that of a canary where one of both ends computes on a GPU; None = the same.
        backend: of channels; auto = what suits each generator, see `weights.plan.backends`.
    """

    def __init__(
        self,
        *,
        run_epoch: int,
        run_name: str,
        timeout_s: float,
        tolerance: float,
        cell_size: int,
        gpu_tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        on_gpu = tolerance if gpu_tolerance is None else gpu_tolerance
        self.rules = SyncRules(run_epoch, run_name, timeout_s, tolerance, on_gpu)
        self.cell_size = cell_size
        self._backend = backend
        self._learner: Placement | None = None  # not known before the trainer says hello
        self.receivers: dict[str, Receiver] = {}
        self.snapshot: SnapshotReady | None = None
        self.rounds: dict[int, SyncRound] = {}  # by channel epoch
        self._round_of: dict[str, SyncRound] = {}  # by member: everybody is in one round at a time
        self.cells: list[Cell] = []
        self.channel_epoch = 0
        self._attempts: dict[int, int] = {}  # by version: offers of it so far
        self._wanted = True  # the publisher may replace the snapshot at any moment: nothing new begins on its memory
        self._wanted_said_at = 0.0
        self._paused_until = 0.0  # no round starts before
        self._first_done_at: float | None = None  # when the first cell got the newest snapshot while others had not
        self._outputs: list[Output] = []

    # -- inputs ----------------------------------------------------------------------------------------------------

    def trainer_joined(self, placement: Placement) -> None:
        """A trainer said hello: from there it will send weights. It has no channel yet."""
        if placement == self._learner:
            return
        self._learner = placement
        self.cells = []  # their members may not fit together any more
        for receiver in self.receivers.values():
            self._choose_backend(receiver)

    def joined(
        self, name: str, incarnation: int, num_workers: int, now: float, placement: Placement | None = None
    ) -> bool:
        """A generator said hello. A new incarnation holds nothing, whatever it says. True if that is news."""
        known = self.receivers.get(name)
        if known is not None and known.incarnation == incarnation:
            return False
        self.left(name, now, "restarted")
        receiver = Receiver(name, incarnation, num_workers, placement=placement or Placement())
        self.receivers[name] = receiver
        self._choose_backend(receiver)
        return True

    def left(self, name: str, now: float, reason: str) -> None:
        """A generator is dead, fenced or gone."""
        self.receivers.pop(name, None)
        current = self._round_of.get(name)
        if current is not None:
            current.left(name, now, reason)
        self._leave_cell(name)
        if current is not None:
            self._advance_round(current, now)

    def set_busy(self, names: set[str]) -> None:
        """These generators must keep their version for now."""
        for receiver in self.receivers.values():
            receiver.busy = receiver.name in names

    def holds(self, name: str, version: int | None, now: float) -> bool:
        """A generator's beat says that it holds `version`, proven. True if that is not what it proved here."""
        receiver = self.receivers.get(name)
        if receiver is None or receiver.held_version in (None, version) or self._in_round(name):
            return False
        waited_s = now - receiver.committed_at
        if waited_s > self.rules.timeout_s + COMMIT_REPEAT_S:
            log.warning("%s holds version %s instead of %d: sent again", name, version, receiver.held_version)
            self.send_again(name)
        elif waited_s > COMMIT_REPEAT_S:
            commit = SyncCommit(self.rules.run_epoch, receiver.held_version, receiver.held_attempt)
            self._emit(ToGenerator(name, commit))
        return True

    def send_again(self, name: str) -> None:
        """What a generator holds is doubted: it counts as holding nothing and is caught up, with all bytes.

        Nothing happens while it takes part in a round: that proves what it holds.
        """
        receiver = self.receivers.get(name)
        if receiver is None or self._in_round(name):
            return
        receiver.held_version = receiver.staged_version = None
        self._leave_cell(name)

    def snapshot_ready(self, message: SnapshotReady, now: float) -> None:
        """The publisher offers a newer snapshot; `advance` starts the rounds. A repeated offer changes nothing."""
        if self.snapshot is not None and message.version <= self.snapshot.version:
            return
        self.snapshot = message
        self._wanted = False
        self._first_done_at = None

    def publisher_lost(self, now: float) -> None:
        """The trainer died: what it offered is gone, and so are all channels."""
        self.snapshot, self._wanted = None, True
        for receiver in self.receivers.values():
            receiver.staged_version = None  # the next trainer's version of this number may have other bytes
        for cell in self.cells:
            cell.channel = None
        for current in self.rounds.values():
            current.abandon(now, "the trainer died")
        self._advance_rounds(now)

    def channel_ready(self, message: ChannelReady, now: float) -> None:
        """The publisher opened a channel, or could not."""
        current = self.rounds.get(message.channel_epoch)
        if current is None or not current.opening:
            self._emit(ToPublisher(CloseChannel(message.channel_epoch)))  # too late
        elif message.error or self._is_unknown(message.version):
            self._paused_until = now + REOPEN_S
            why = message.error or f"its offer of version {message.version} got lost"
            current.abandon(now, f"the publisher could not open a channel: {why}")
            self._advance_rounds(now)
        else:
            incarnations = {name: member.receiver.incarnation for name, member in current.members.items()}
            opened = OpenedChannel(message.channel_epoch, message.host, message.port, message.backend, incarnations)
            self._offer(current, opened, now)

    def broadcast_done(self, message: BroadcastDone, now: float) -> None:
        """The publisher says how a broadcast ended."""
        if (current := self.rounds.get(message.channel_epoch)) is not None:
            current.broadcast_done(message, now)
            self._advance_round(current, now)

    def reply(self, name: str, message: SyncReply, now: float) -> None:
        """A generator says how a phase ended for it."""
        if message.run_epoch != self.rules.run_epoch:
            return  # of a learner before this one, whose versions and attempts have the same numbers
        current = self._round_of.get(name)
        if current is not None:
            current.reply(name, message, now)
            self._advance_round(current, now)

    def advance(self, now: float) -> None:
        """Applies deadlines and starts rounds that are due. Called whenever something happened or time passed."""
        self._advance_rounds(now)
        if self.snapshot is not None:
            if now >= self._paused_until:
                self._start_cells(now)
                self._start_catch_ups(now)
            self._ask_for_newer(now)

    # -- outputs ---------------------------------------------------------------------------------------------------

    def take_outputs(self) -> list[Output]:
        """What has to be done or told since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_deadline(self, now: float) -> float | None:
        """When `advance` must be called next even if nothing happens; None if nothing is waited for."""
        deadlines = [current.next_deadline() for current in self.rounds.values()]
        deadlines += [receiver.excluded_until for receiver in self.receivers.values() if receiver.excluded_until > now]
        deadlines += [self._paused_until] if self._paused_until > now else []
        if self.snapshot is not None and self._wanted:
            deadlines.append(self._wanted_said_at + WANTED_REPEAT_S)
        elif self._first_done_at is not None and not self._wanted:
            deadlines.append(self._first_done_at + CELL_GRACE_S)
        return min(deadlines, default=None)

    def held_version(self, name: str) -> int | None:
        """The version that this generator proved; None before it has, and for a generator that is not known."""
        receiver = self.receivers.get(name)
        return receiver.held_version if receiver else None

    def _is_unknown(self, offered_version: int | None) -> bool:
        return offered_version is not None and (self.snapshot is None or offered_version != self.snapshot.version)

    def _choose_backend(self, receiver: Receiver) -> None:
        """By where both compute; a generator that weights cannot reach is sent away."""
        if self._learner is None:
            return
        receiver.on_gpu = bool(self._learner.gpus or receiver.placement.gpus)
        try:
            receiver.backend = backend_for(self._backend, self._learner, receiver.placement)
        except BackendRefused as refusal:
            self._emit(Unreachable(receiver.name, str(refusal)))
            return
        log.info("weights travel to %s over %s", receiver.name, receiver.backend)

    def _fits(self, names: Sequence[str], name: str) -> bool:
        """Whether a generator can share a channel with these."""
        one = self.receivers[name]
        others = [self.receivers[other] for other in names]
        return all(
            other.backend == one.backend and fit_together(one.backend, other.placement, one.placement)
            for other in others
        )

    # -- which rounds start ----------------------------------------------------------------------------------------

    def _behind(self) -> list[Receiver]:
        """The receivers that can take the newest snapshot now and do not hold it."""
        assert self.snapshot is not None
        newest = self.snapshot.version, self.snapshot.manifest.digests
        taken = self._round_of
        return [
            receiver
            for name, receiver in sorted(self.receivers.items())
            # Digests too: a trainer that came back and could not repeat its past has other bytes under this number.
            if (receiver.held_version, receiver.held_digests) != newest and not receiver.busy and name not in taken
        ]

    def _placed(self) -> set[str]:
        """Names of the receivers that are in a cell."""
        return {name for cell in self.cells for name in cell.names}

    def _start_cells(self, now: float) -> None:
        """Rounds for the cells that are behind; generators that were caught up are merged into them."""
        behind = {receiver.name: receiver for receiver in self._behind() if receiver.excluded_until <= now}
        starting = [cell for cell in self.cells if any(name in behind for name in cell.names)]
        if self.cells and not starting:
            return
        placed = self._placed()
        loose = [receiver for name, receiver in behind.items() if name not in placed and not receiver.failed]
        if self.cells:
            loose = [receiver for receiver in loose if receiver.held_version is not None]
        kept = [[name for name in cell.names if name in behind] for cell in starting]
        planned = plan_cells(kept, [receiver.name for receiver in loose], self.cell_size, self._fits)
        before = [cell for cell, names in zip(starting, kept, strict=True) if names]
        new = [Cell([]) for _ in planned[len(before) :]]
        self.cells.extend(new)
        for names, cell in zip(planned, [*before, *new], strict=True):
            cell.names = names
            self._start(cell, [behind[name] for name in names], now)

    def _start(self, cell: Cell, members: list[Receiver], now: float) -> None:
        incarnations = {receiver.name: receiver.incarnation for receiver in members}
        if cell.channel is not None and cell.channel.incarnations == incarnations and not self._wanted:
            current = self._new_round(cell.channel.epoch, members, now)
            self._offer(current, cell.channel, now)
            return
        self._close_channel(cell)
        self.channel_epoch += 1
        self._new_round(self.channel_epoch, members, now).open()

    def _start_catch_ups(self, now: float) -> None:
        """Rounds beside the cells, on channels of their own, for the receivers that have to prove themselves.

        Newcomers go together, up to a cell's size: one by one, a fleet that starts late would take minutes. Who failed
        goes alone, so that it can stall nobody else.
        """
        placed = self._placed()
        cells_wait = all(self.receivers[name].busy for name in placed)
        room = MAX_CATCH_UPS - sum(current.catch_up for current in self.rounds.values())
        together: list[Receiver] = []
        alone: list[Receiver] = []
        for receiver in self._behind() if room > 0 else ():
            needs_it = receiver.held_version is None or receiver.failed or cells_wait
            if receiver.name not in placed and needs_it and receiver.excluded_until <= now:
                (alone if receiver.failed else together).append(receiver)
        parts = plan_cells([], [receiver.name for receiver in together], self.cell_size, self._fits)
        for names in [*parts, *([receiver.name] for receiver in alone)][: max(room, 0)]:
            self.channel_epoch += 1
            members = [self.receivers[name] for name in names]
            self._new_round(self.channel_epoch, members, now, catch_up=True).open()

    def _new_round(
        self, channel_epoch: int, members: list[Receiver], now: float, *, catch_up: bool = False
    ) -> SyncRound:
        assert self.snapshot is not None
        senders = self.snapshot.manifest.layout.num_senders
        current = SyncRound(self.rules, channel_epoch, members, self._emit, catch_up=catch_up, now=now, senders=senders)
        self.rounds[channel_epoch] = current
        self._round_of.update(dict.fromkeys(current.members, current))
        return current

    def _offer(self, current: SyncRound, channel: OpenedChannel, now: float) -> None:
        """Offers the newest snapshot, which may have come after the round started, while the channel opened."""
        assert self.snapshot is not None
        version = self.snapshot.version
        attempt = self._attempts.get(version, 0)
        still_needed = {number: count for number, count in self._attempts.items() if number >= version}
        self._attempts = still_needed | {version: attempt + 1}
        current.offer(channel, self.snapshot, attempt, now)

    def _ask_for_newer(self, now: float) -> None:
        """Lets the publisher replace the snapshot once no cell is at work on it, but for those that are late."""
        assert self.snapshot is not None
        at_work = [current for current in self.rounds.values() if not current.catch_up]
        if self._wanted:
            due = now >= self._wanted_said_at + WANTED_REPEAT_S
        else:
            due = not at_work or self._grace_is_over(now)
        if due:
            self._wanted, self._wanted_said_at = True, now
            self._emit(ToPublisher(SnapshotWanted(self.snapshot.version, self._channels_in_use())))

    def _channels_in_use(self) -> list[int]:
        return sorted({*self.rounds, *(cell.channel.epoch for cell in self.cells if cell.channel is not None)})

    def _grace_is_over(self, now: float) -> bool:
        return self._first_done_at is not None and now >= self._first_done_at + CELL_GRACE_S

    # -- how rounds end --------------------------------------------------------------------------------------------

    def _advance_rounds(self, now: float) -> None:
        for current in list(self.rounds.values()):
            self._advance_round(current, now)

    def _advance_round(self, current: SyncRound, now: float) -> None:
        current.advance(now)
        if current.ended:
            self._end(current, now)

    def _end(self, current: SyncRound, now: float) -> None:
        del self.rounds[current.channel_epoch]
        for name in current.members:
            if self._round_of.get(name) is current:
                del self._round_of[name]
        self._emit(current.result(now))
        cell = None if current.catch_up else self._cell_of(current.members)
        if cell is not None:
            cell.channel = current.channel if current.held_by_all else None
        if cell is None or cell.channel is None:
            self._emit(ToPublisher(CloseChannel(current.channel_epoch)))
        if cell is None:
            return
        committed = any(member.phase is Phase.COMMITTED for member in current.members.values())
        for member in current.members.values():
            # Where others succeeded, a member that failed was no victim of theirs.
            if member.receiver.failed and (committed or member.receiver.faults or member.receiver.errors > 1):
                self._leave_cell(member.name)
        if committed and current.snapshot is self.snapshot and self._first_done_at is None:
            self._first_done_at = now

    def _cell_of(self, names: Iterable[str]) -> Cell | None:
        wanted = set(names)
        return next((cell for cell in self.cells if wanted & set(cell.names)), None)

    def _leave_cell(self, name: str) -> None:
        for cell in self.cells:
            if name in cell.names:
                cell.names.remove(name)
                if not self._at_work(cell):
                    self._close_channel(cell)
        self.cells = [cell for cell in self.cells if cell.names]

    def _close_channel(self, cell: Cell) -> None:
        if cell.channel is not None:
            self._emit(ToPublisher(CloseChannel(cell.channel.epoch)))
            cell.channel = None

    def _at_work(self, cell: Cell) -> bool:
        return any(not current.catch_up and set(current.members) & set(cell.names) for current in self.rounds.values())

    def _in_round(self, name: str) -> bool:
        return name in self._round_of

    def _emit(self, output: Output) -> None:
        self._outputs.append(output)

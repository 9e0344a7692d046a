"""Which generator holds which policy version, and how it gets the next one: a state machine without sockets or clock.

One *round* brings one snapshot to a set of members over one process group::

    OPENING    the publisher hosts the store of a new group        (skipped while the members stay the same)
    STAGING    members join, receive every bucket into their own staging buffer, verify digests; generation goes on
    SWAPPING   each member loads the staged weights between two decode steps and scores the canary sequences
    committed  digests and canary agree: tokens of this version may leave that generator

Who waits for whom, and until when:

- STAGING waits for every member and for the publisher, `timeout_s` from the offer. The first sign of failure shortens
  the wait for the others to `GRACE_S`: a broken collective fails everywhere at once, and who stays silent is to
  blame. The publisher is always waited for: it ends by its own deadline, and only then can it open the next group.
- SWAPPING waits for each member alone. A slow one delays nobody else's commit, only the next round, by `timeout_s`.
- A member that was silent or tainted sits out the next rounds (`PENALTY_S`, doubling), so that it costs the others one
  deadline and not one per round. A member that answered with an error may be the victim and is tried again at once,
  a few times.

Groups are numbered (`group_epoch`) and used again only while nothing went wrong in them; a store prefix never is.

A snapshot goes out as a delta when the publisher has one and every member's staging buffer was verified to hold its
base. A member that fails in any phase, or is new, is relied on for nothing: its next round is dense, for all in it.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from asyncrl.learner.sync_records import (
    Committed,
    Member,
    Output,
    Phase,
    Receiver,
    Round,
    RoundEnded,
    SyncFailed,
    ToGenerator,
    ToPublisher,
)
from asyncrl.transport.messages import (
    Broadcast,
    BroadcastDone,
    GroupReady,
    OpenGroup,
    SnapshotReady,
    SnapshotReleased,
    SyncAbort,
    SyncCommit,
    SyncOffer,
    SyncReply,
    SyncSwap,
)
from asyncrl.types import LOGPROB_DTYPE

log = logging.getLogger(__name__)

GRACE_S = 2.0
PENALTY_S = 5.0
MAX_PENALTY_S = 120.0
MAX_TAINTS = 3
MAX_ERRORS = 3  # from here on a member that answers with errors sits out like one that is silent


class SyncPlanner:
    """Decides what publisher and generators do next; the desk carries the messages.

    Every input takes `now` (monotonic seconds) and appends to `outputs`, which the desk drains with `take_outputs`.
    """

    def __init__(self, *, run_epoch: int, run_name: str, timeout_s: float, tolerance: float) -> None:
        self.run_epoch = run_epoch
        self.run_name = run_name
        self.timeout_s = timeout_s
        self.tolerance = tolerance
        self.receivers: dict[str, Receiver] = {}
        self.snapshot: SnapshotReady | None = None
        self.round: Round | None = None
        self.group_epoch = 0
        self._group_members: dict[str, int] = {}  # name -> incarnation of the open group; empty = none is open
        self._group_address: tuple[str, int, str] | None = None
        self._attempts: dict[int, int] = {}
        self._released: int | None = None  # version of the last snapshot given back to the publisher
        self._outputs: list[Output] = []

    # -- inputs ----------------------------------------------------------------------------------------------------

    def joined(self, name: str, incarnation: int, num_workers: int, now: float) -> None:
        """A generator said hello. A new incarnation holds nothing, whatever it says."""
        known = self.receivers.get(name)
        if known is not None and known.incarnation == incarnation:
            return
        self.left(name, now, "restarted")
        self.receivers[name] = Receiver(name, incarnation, num_workers)

    def left(self, name: str, now: float, reason: str) -> None:
        """A generator is dead, fenced or gone."""
        self.receivers.pop(name, None)
        if self.round and name in self.round.members:
            self._fail(self.round.members[name], now, reason, silent=False)
            self._advance(now)

    def set_busy(self, names: set[str]) -> None:
        """These generators must keep their version for now."""
        for receiver in self.receivers.values():
            receiver.busy = receiver.name in names

    def snapshot_ready(self, message: SnapshotReady, now: float) -> None:
        """The publisher offers a newer snapshot. It does so only between rounds; `advance` starts the next one."""
        self.snapshot, self._released = message, None
        if self.round is not None and self.round.opening_deadline is not None:
            # The one before was released and replaced while the wish for a group was on its way to the publisher.
            # Nothing of the round has reached a generator yet, so it goes on with the newer version.
            self.round.version, self.round.attempt = message.version, self._next_attempt(message.version)

    def publisher_lost(self, now: float) -> None:
        """The trainer died: what it offered is gone, and so is the open group."""
        self.snapshot = None
        self._forget_group()
        for receiver in self.receivers.values():
            receiver.staged_version = None  # the next trainer's version of this number may have other bytes
        if self.round:
            for member in self.round.members.values():
                self._fail(member, now, "the trainer died", silent=False)
            self.round.broadcast_done = True
            self._advance(now)

    def group_ready(self, message: GroupReady, now: float) -> None:
        current = self.round
        if current is None or current.opening_deadline is None or message.group_epoch != current.group_epoch:
            return
        if message.error:
            self._abandon_round(now, f"the publisher could not open a group: {message.error}")
            return
        self._group_address = (message.host, message.port, message.backend)
        self._group_members = {m.name: m.incarnation for m in current.members.values()}
        current.opening_deadline = None
        self._offer(now)

    def broadcast_done(self, message: BroadcastDone, now: float) -> None:
        current = self.round
        if current is None or (message.group_epoch, message.attempt) != (current.group_epoch, current.attempt):
            return
        current.broadcast_done = True
        current.transfer_ms, current.encode_ms = message.transfer_ms, message.encode_ms
        current.num_bytes, current.dense_bytes = message.num_bytes, message.dense_bytes
        if message.error:
            log.warning("broadcast of version %d: %s", message.version, message.error)
            self._break(now)
        self._advance(now)

    def reply(self, name: str, message: SyncReply, now: float) -> None:
        current = self.round
        if current is None or (message.version, message.attempt) != (current.version, current.attempt):
            return
        member = current.members.get(name)
        if member is None or message.phase != member.phase.value:
            return
        member.timings_ms.update(message.timings_ms)
        if message.phase == Phase.STAGING.value:
            self._staged(member, message, now)
        else:
            self._swapped(member, message, now)
        self._advance(now)

    def advance(self, now: float) -> None:
        """Applies deadlines and starts a round if one is due. Called whenever something happened or time passed."""
        self._advance(now)
        if self.round is None:
            self._maybe_start(now)

    # -- outputs ---------------------------------------------------------------------------------------------------

    def take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_deadline(self, now: float) -> float | None:
        """When `advance` must be called next even if nothing happens; None if nothing is waited for."""
        current = self.round
        if current is None:
            waits = [r.excluded_until for r in self.receivers.values() if r.excluded_until > now and self._behind(r)]
            return min(waits, default=None)
        if current.opening_deadline is not None:
            return current.opening_deadline
        deadlines = [m.deadline for m in current.members.values() if m.phase in (Phase.STAGING, Phase.SWAPPING)]
        if not current.broadcast_done:
            deadlines.append(current.broadcast_deadline)
        return min(deadlines, default=None)

    def held_version(self, name: str) -> int | None:
        receiver = self.receivers.get(name)
        return receiver.held_version if receiver else None

    # -- a round ---------------------------------------------------------------------------------------------------

    def _behind(self, receiver: Receiver) -> bool:
        return self.snapshot is not None and receiver.held_version != self.snapshot.version

    def _maybe_start(self, now: float) -> None:
        if self.snapshot is None:
            return
        due = [r for r in self.receivers.values() if self._behind(r) and not r.busy and r.excluded_until <= now]
        if not due:
            self._release_snapshot()
            return
        version = self.snapshot.version
        self._released = None  # used again, so it has to be given back again
        attempt = self._next_attempt(version)
        members, rank = {}, 1
        for receiver in sorted(due, key=lambda r: r.name):
            members[receiver.name] = Member(
                receiver.name, receiver.incarnation, rank, Phase.STAGING, now + self.timeout_s
            )
            rank += receiver.num_workers
        reuse = self._group_members == {m.name: m.incarnation for m in members.values()}
        if not reuse:
            self._forget_group()
            self.group_epoch += 1
        self.round = Round(
            version,
            attempt,
            self.group_epoch,
            rank,
            members,
            now,
            opening_deadline=None if reuse else now + self.timeout_s,
            broadcast_deadline=now + self.timeout_s,
        )
        if reuse:
            self._offer(now)
        else:
            self._emit(ToPublisher(OpenGroup(self.group_epoch, self._prefix(), rank, self.timeout_s)))

    def _next_attempt(self, version: int) -> int:
        attempt = self._attempts.get(version, 0)
        self._attempts = {version: attempt + 1}
        return attempt

    def _offer(self, now: float) -> None:
        current, snapshot = self.round, self.snapshot
        assert current is not None and snapshot is not None and self._group_address is not None
        host, port, backend = self._group_address
        current.broadcast_deadline = now + self.timeout_s + GRACE_S
        current.base_version, manifest = self._choose_encoding(current, snapshot)
        for member in current.members.values():
            if member.phase is not Phase.STAGING:
                continue
            member.deadline = now + self.timeout_s
            group = {
                "group_epoch": current.group_epoch,
                "store_host": host,
                "store_port": port,
                "prefix": self._prefix(),
                "rank": member.rank,
                "world_size": current.world_size,
                "backend": backend,
            }
            offer = SyncOffer(self.run_epoch, current.version, current.attempt, group, manifest, self.timeout_s)
            self._emit(ToGenerator(member.name, offer))
        order = Broadcast(current.version, current.attempt, current.group_epoch, self.timeout_s, current.base_version)
        self._emit(ToPublisher(order))

    def _choose_encoding(self, current: Round, snapshot: SnapshotReady) -> tuple[int | None, dict[str, Any]]:
        """(base version, manifest) of a delta if all members can take it, of everything if not."""
        staging = [name for name, member in current.members.items() if member.phase is Phase.STAGING]
        held = {self.receivers[name].staged_version for name in staging}
        if snapshot.delta is None or held != {snapshot.delta["base_version"]}:
            return None, snapshot.manifest
        return snapshot.delta["base_version"], snapshot.manifest | {"delta": snapshot.delta}

    def _staged(self, member: Member, message: SyncReply, now: float) -> None:
        current = self.round
        assert self.snapshot is not None and current is not None
        if message.error:
            self._fail(member, now, message.error, silent=False)
            self._break(now)
        elif [list(digests) for digests in message.digests] != self._expected_digests(member):
            self._fail(member, now, "staged weights differ from the learner's (digest)", silent=True)
        else:
            member.phase = Phase.STAGED
            self.receivers[member.name].staged_version = current.version

    def _expected_digests(self, member: Member) -> list[list[int]]:
        assert self.snapshot is not None
        return [list(self.snapshot.manifest["digests"])] * self.receivers[member.name].num_workers

    def _swapped(self, member: Member, message: SyncReply, now: float) -> None:
        if message.error:
            self._taint(member, now, message.error)
            return
        largest, mean = self._canary_diffs(message.canary_logprobs)
        if not largest <= self.tolerance:  # also true for NaN
            self._taint(
                member,
                now,
                f"canary log-probs differ by {largest:.3g}, allowed {self.tolerance:.3g} (weights.canary_tolerance)",
            )
            return
        self._commit(member, largest, mean, now)

    def _canary_diffs(self, theirs: list[bytes]) -> tuple[float, float]:
        """Largest and mean |theirs - ours| over all canary tokens; infinite where they cannot be compared."""
        assert self.snapshot is not None
        ours = self.snapshot.canary_logprobs
        if len(ours) != len(theirs) or any(len(a) != len(b) for a, b in zip(ours, theirs, strict=False)):
            return float("inf"), float("inf")
        # One array over all sequences: its maximum is NaN wherever the NaN is, which Python's max would lose.
        diffs = np.abs(np.frombuffer(b"".join(theirs), LOGPROB_DTYPE) - np.frombuffer(b"".join(ours), LOGPROB_DTYPE))
        return float(diffs.max()), float(diffs.mean(dtype=np.float64))

    def _commit(self, member: Member, canary_max_diff: float, canary_mean_diff: float, now: float) -> None:
        current = self.round
        assert current is not None
        member.phase = Phase.COMMITTED
        receiver = self.receivers[member.name]
        receiver.held_version = current.version
        receiver.silences = receiver.errors = receiver.taints = 0
        self._emit(ToGenerator(member.name, SyncCommit(self.run_epoch, current.version, current.attempt)))
        self._emit(
            Committed(
                member.name,
                current.version,
                current.attempt,
                (now - current.started) * 1e3,
                current.transfer_ms,
                current.num_bytes,
                canary_max_diff,
                canary_mean_diff,
                member.timings_ms,
            )
        )

    def _taint(self, member: Member, now: float, reason: str) -> None:
        receiver = self.receivers.get(member.name)
        if receiver:
            receiver.held_version = None
            receiver.taints += 1
        self._fail(member, now, reason, silent=True, tainted=True)

    def _fail(self, member: Member, now: float, reason: str, *, silent: bool, tainted: bool = False) -> None:
        current = self.round
        assert current is not None
        if member.phase in (Phase.COMMITTED, Phase.FAILED):
            return
        phase, member.phase = member.phase.value, Phase.FAILED
        receiver = self.receivers.get(member.name)
        fatal = receiver is not None and receiver.taints >= MAX_TAINTS
        if receiver and current.opening_deadline is None:  # from the offer on its staging buffer may hold anything
            receiver.staged_version = None
        if receiver and not silent:
            receiver.errors += 1
            silent = receiver.errors >= MAX_ERRORS
        if receiver and silent:
            receiver.silences += 1
            receiver.excluded_until = now + min(PENALTY_S * 2 ** (receiver.silences - 1), MAX_PENALTY_S)
        if phase == Phase.SWAPPING.value or tainted:
            if receiver:
                receiver.held_version = None
            tainted = True
        abort = SyncAbort(self.run_epoch, current.version, current.attempt, reason, tainted)
        self._emit(ToGenerator(member.name, abort))
        self._emit(SyncFailed(member.name, current.version, phase, reason, fatal))

    def _break(self, now: float) -> None:
        """A collective failed somewhere: it failed everywhere, so nobody is waited for much longer."""
        current = self.round
        assert current is not None
        current.broken = True
        for member in current.members.values():
            if member.phase is Phase.STAGING:
                member.deadline = min(member.deadline, now + GRACE_S)

    def _advance(self, now: float) -> None:
        current = self.round
        if current is None:
            return
        if current.opening_deadline is not None:
            if now >= current.opening_deadline:
                self._abandon_round(now, f"the publisher opened no group within {self.timeout_s:.0f} s")
            elif all(m.phase is Phase.FAILED for m in current.members.values()):
                self._end_round(now)
            return
        self._expire(current, now)
        self._start_swaps(current, now)
        settled = all(m.phase in (Phase.COMMITTED, Phase.FAILED) for m in current.members.values())
        if settled and current.broadcast_done:
            self._end_round(now)

    def _expire(self, current: Round, now: float) -> None:
        if not current.broadcast_done and now >= current.broadcast_deadline:
            current.broadcast_done = True  # the publisher aborts by its own deadline; its group is not used again
            self._break(now)
        for member in current.members.values():
            if member.phase is Phase.STAGING and now >= member.deadline:
                current.broken = True
                self._fail(member, now, "no answer to the offer within the deadline", silent=True)
            elif member.phase is Phase.SWAPPING and now >= member.deadline:
                self._taint(member, now, "no answer to the swap within the deadline")

    def _start_swaps(self, current: Round, now: float) -> None:
        assert self.snapshot is not None or all(m.phase is Phase.FAILED for m in current.members.values())
        for member in current.members.values():
            if member.phase is not Phase.STAGED or self.snapshot is None:
                continue
            member.phase, member.deadline = Phase.SWAPPING, now + self.timeout_s
            # From here on its engine may hold anything; what it held before counts no more.
            self.receivers[member.name].held_version = None
            swap = SyncSwap(self.run_epoch, current.version, current.attempt, self.snapshot.canary, self.timeout_s)
            self._emit(ToGenerator(member.name, swap))

    def _abandon_round(self, now: float, reason: str) -> None:
        current = self.round
        assert current is not None
        log.warning("weight sync to version %d: %s", current.version, reason)
        for member in current.members.values():
            self._fail(member, now, reason, silent=False)
        current.broken = True
        self._end_round(now)

    def _end_round(self, now: float) -> None:
        current, self.round = self.round, None
        assert current is not None
        num_failed = sum(m.phase is Phase.FAILED for m in current.members.values())
        if current.broken or num_failed:
            self._forget_group()
        self._emit(
            RoundEnded(
                current.version,
                (now - current.started) * 1e3,
                current.transfer_ms,
                current.num_bytes,
                len(current.members) - num_failed,
                num_failed,
                current.base_version,
                current.dense_bytes,
                current.encode_ms,
            )
        )
        self._release_snapshot()

    def _release_snapshot(self) -> None:
        """Between rounds the publisher may replace what it offers."""
        if self.snapshot is not None and self._released != self.snapshot.version:
            self._released = self.snapshot.version
            self._emit(ToPublisher(SnapshotReleased(self.snapshot.version)))

    def _forget_group(self) -> None:
        self._group_members, self._group_address = {}, None

    def _prefix(self) -> str:
        return f"{self.run_name}/{self.run_epoch}/{self.group_epoch}"

    def _emit(self, output: Output) -> None:
        self._outputs.append(output)

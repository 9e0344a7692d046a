"""One round of weight sync: one snapshot, one weight channel, its members. A state machine without sockets or clock.

    OPENING    the publisher hosts the store of a new channel      (skipped while a cell stays as it is)
    STAGING    members join, receive every bucket into their own staging buffer, verify digests; generation goes on
    SWAPPING   each member loads the staged weights between two decode steps, compares the bits in use with them, and
               scores the canary sequences
    committed  digests, bits and canary agree: tokens of this version may leave that generator

The bits in use prove that no tensor is of another version, in any dtype; the canary, that the engine computes with them
as the learner does.

Who waits for whom, and until when:

- OPENING ends `timeout_s` after it was asked for.
- STAGING waits for every member and for the publisher, `timeout_s` from the offer plus GRACE_S, so that a member can
  still say why it failed. The first sign of failure shortens the wait for the others to GRACE_S: a broken collective
  fails everywhere at once, and a member that stays silent is to blame. The publisher is always waited for: it ends by
  its own deadline.
- SWAPPING waits for each member alone. A slow member delays nobody else's commit.
- A member at fault (silent, tainted, wrong digests) sits out (PENALTY_S, doubling). A member that answered with an
  error may be the victim of another member's failure and is tried again at once, MAX_ERRORS times.

A snapshot goes out as a delta when the publisher has one and every member's staging buffer was verified to hold its
base. A member that fails in any phase is relied on for nothing: its next round is dense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from asyncrl.link.messages import SyncAbort, SyncCommit, SyncOffer, SyncReply, SyncSwap
from asyncrl.link.trainer_messages import Broadcast, BroadcastDone, OpenChannel, SnapshotReady
from asyncrl.link.weight_records import BitsInUse, ChannelPlace, WeightManifest
from asyncrl.link.wire_types import SyncPhase
from asyncrl.types import LOGPROB_DTYPE
from asyncrl.weights.plan.records import (
    Committed,
    Member,
    OpenedChannel,
    Output,
    Phase,
    Receiver,
    RoundEnded,
    SyncFailed,
    SyncRules,
    ToGenerator,
    ToPublisher,
)

log = logging.getLogger(__name__)

GRACE_S = 1.0
PENALTY_S = 5.0
MAX_PENALTY_S = 120.0
MAX_TAINTS = 3
MAX_ERRORS = 3  # from here on a member that answers with errors sits out like one that does not answer


class SyncRound:
    """Brings one snapshot to `members`. Every input takes `now` (monotonic seconds); outputs go to `emit`.

    Its planner starts it with `open` or `offer`, hands it its messages, and drops it once it has `ended`.
    """

    def __init__(
        self,
        rules: SyncRules,
        channel_epoch: int,
        members: Sequence[Receiver],
        emit: Callable[[Output], None],
        *,
        catch_up: bool,
        now: float,
        senders: int = 1,
    ) -> None:
        """`senders`: the learner's ranks that send; they have the first places in the channel."""
        self.channel_epoch = channel_epoch
        self.catch_up = catch_up
        self.channel: OpenedChannel | None = None
        self.snapshot: SnapshotReady | None = None  # chosen when the channel is open
        self.attempt = 0
        self.members: dict[str, Member] = {}
        self.senders = self.world_size = senders
        for receiver in members:
            deadline = now + rules.timeout_s
            self.members[receiver.name] = Member(receiver, self.world_size, Phase.STAGING, deadline)
            self.world_size += receiver.num_workers
        self.backend = members[0].backend if members else "gloo"  # all have one
        self.broken = False  # something failed in the collective; its channel is not used again
        self._rules = rules
        self._emit = emit
        self._started = now
        self._opening_deadline = now + rules.timeout_s
        self._broadcast: BroadcastDone | None = None
        self._broadcast_over = False  # it ended, or will by its own deadline in a channel that nobody uses any more
        self._broadcast_deadline = 0.0
        self._cut_short = ""  # why members are not waited for until their deadline
        self._base_version: int | None = None
        self._committed: list[Committed] = []
        self._retries = max((receiver.faults + receiver.errors for receiver in members), default=0)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Asks the publisher for a channel of its own."""
        timeout_s = self._rules.timeout_s
        opening = OpenChannel(self.channel_epoch, self._prefix(), self.world_size, timeout_s, self.backend)
        self._emit(ToPublisher(opening))

    def offer(self, channel: OpenedChannel, snapshot: SnapshotReady, attempt: int, now: float) -> None:
        """The channel is open: members and publisher are told to transfer `snapshot`."""
        self.channel = channel
        self.snapshot = snapshot
        self.attempt = attempt
        rules = self._rules
        self._broadcast_deadline = now + rules.timeout_s + GRACE_S
        self._base_version, manifest = self._choose_encoding(snapshot)
        for member in self._in(Phase.STAGING):
            member.asked_at, member.deadline = now, now + rules.timeout_s + GRACE_S
            place = ChannelPlace(
                channel_epoch=self.channel_epoch,
                store_host=channel.host,
                store_port=channel.port,
                prefix=self._prefix(),
                rank=member.rank,
                world_size=self.world_size,
                backend=channel.backend,
                num_senders=self.senders if self.senders > 1 else None,
            )
            offer = SyncOffer(rules.run_epoch, snapshot.version, attempt, place, manifest, rules.timeout_s)
            self._emit(ToGenerator(member.name, offer))
        order = Broadcast(snapshot.version, attempt, self.channel_epoch, rules.timeout_s, self._base_version)
        self._emit(ToPublisher(order))

    def abandon(self, now: float, reason: str) -> None:
        """Ends the round for members that have not staged, without blame. The channel is closed when it has ended."""
        log.warning("weight sync in channel %d given up: %s", self.channel_epoch, reason)
        self.broken = self._broadcast_over = True
        for member in self._in(Phase.STAGING):
            self._fail(member, now, reason, blame=False)

    def broadcast_done(self, message: BroadcastDone, now: float) -> None:
        """The publisher says how its broadcast ended. What belongs to another attempt is ignored."""
        version = None if self.snapshot is None else self.snapshot.version
        if (message.version, message.attempt) != (version, self.attempt) or self._broadcast_over:
            return
        self._broadcast, self._broadcast_over = message, True
        if message.error:
            log.warning("broadcast of version %d: %s", message.version, message.error)
            self._break(now, f"the publisher failed: {message.error}")

    def reply(self, name: str, message: SyncReply, now: float) -> None:
        """A member says how a phase ended for it. What belongs to another attempt or phase is ignored."""
        member = self.members.get(name)
        if self.snapshot is None or (message.version, message.attempt) != (self.snapshot.version, self.attempt):
            return
        if member is None or message.phase != member.phase.value:
            return
        member.timings_ms.update(message.timings_ms)
        if message.phase is SyncPhase.STAGE:
            self._staged(member, message, now)
        else:
            self._swapped(member, message, now)

    def left(self, name: str, now: float, reason: str) -> None:
        """A generator is dead, fenced or gone."""
        member = self.members.get(name)
        if member is None:
            return
        needed = member.phase is Phase.STAGING
        self._fail(member, now, reason)
        if needed:
            self.abandon(now, f"{name} {reason}")  # no member can complete without it: no need to wait

    def advance(self, now: float) -> None:
        """Applies deadlines and goes on to the next phase where one is due."""
        if self.opening:
            if now >= self._opening_deadline:
                why = f"the publisher opened no channel within {self._rules.timeout_s:g} s"
                self.abandon(now, why)
            return
        self._expire(now)
        for member in self._in(Phase.STAGED):
            self._swap(member, now)

    # -- where it stands ---------------------------------------------------------------------------------------------

    @property
    def opening(self) -> bool:
        """Its channel is not open yet."""
        return self.channel is None

    @property
    def ended(self) -> bool:
        """Every member committed or failed, and the publisher is through."""
        settled = all(member.phase in (Phase.COMMITTED, Phase.FAILED) for member in self.members.values())
        return settled and (self._broadcast_over or self.opening)

    @property
    def held_by_all(self) -> bool:
        """The round ended as it should: its channel can be used again."""
        return not self.broken and all(member.phase is Phase.COMMITTED for member in self.members.values())

    def next_deadline(self) -> float:
        """When `advance` must be called next even if nothing happens."""
        if self.opening:
            return self._opening_deadline
        deadlines = [member.deadline for member in self._in(Phase.STAGING, Phase.SWAPPING)]
        if not self._broadcast_over:
            deadlines.append(self._broadcast_deadline)
        return min(deadlines, default=float("inf"))

    def result(self, now: float) -> RoundEnded:
        """What the round came to, once it has ended."""
        done, snapshot = self._broadcast, self.snapshot
        return RoundEnded(
            version=-1 if snapshot is None else snapshot.version,
            total_ms=(now - self._started) * 1e3,
            transfer_ms=done.transfer_ms if done else 0.0,
            num_bytes=done.num_bytes if done else 0,
            committed=tuple(self._committed),
            failed=tuple(member.name for member in self._in(Phase.FAILED)),
            snapshot_ms=snapshot.snapshot_ms if snapshot else 0.0,
            base_version=self._base_version,
            dense_bytes=done.dense_bytes if done else 0,
            encode_ms=done.encode_ms if done else 0.0,
            retries=self._retries,
            catch_up=self.catch_up,
        )

    # -- phases ----------------------------------------------------------------------------------------------------

    def _choose_encoding(self, snapshot: SnapshotReady) -> tuple[int | None, WeightManifest]:
        """(base version, manifest) of a delta if all members can take it, of everything if not."""
        held = {member.receiver.staged_version for member in self._in(Phase.STAGING)}
        if snapshot.delta is None or held != {snapshot.delta.base_version}:
            return None, snapshot.manifest
        return snapshot.delta.base_version, replace(snapshot.manifest, delta=snapshot.delta)

    def _staged(self, member: Member, message: SyncReply, now: float) -> None:
        assert self.snapshot is not None
        expected = [list(self.snapshot.manifest.digests)] * member.receiver.num_workers
        if message.error:
            self._fail(member, now, message.error)
            self._break(now, f"{member.name} failed: {message.error}")
        elif [list(digests) for digests in message.digests] != expected:
            self._fail(member, now, _wrong_digests(member, message.digests, expected[0]), at_fault=True)
        else:
            member.phase = Phase.STAGED
            # Workers of one model keep slices of it, from which no delta starts.
            member.receiver.staged_version = self.snapshot.version if member.receiver.num_workers == 1 else None

    def _swap(self, member: Member, now: float) -> None:
        assert self.snapshot is not None
        rules = self._rules
        member.phase = Phase.SWAPPING
        member.asked_at = now
        member.deadline = now + rules.timeout_s + GRACE_S
        # From here on its engine may hold anything; what it held before counts no more.
        member.receiver.held_version = None
        swap = SyncSwap(rules.run_epoch, self.snapshot.version, self.attempt, self.snapshot.canary, rules.timeout_s)
        self._emit(ToGenerator(member.name, swap))

    def _swapped(self, member: Member, message: SyncReply, now: float) -> None:
        assert self.snapshot is not None
        if message.error:
            self._fail(member, now, message.error, at_fault=True)
            return
        if wrong := _wrong_bits(member, message.in_use, self.snapshot.version):
            self._fail(member, now, wrong, at_fault=True)
            return
        most, most_in_mean = self._rules.tolerances(member.receiver.on_gpu)
        largest, mean = canary_differences(self.snapshot.canary_logprobs, message.canary_logprobs)
        for what, difference, allowed in (("", largest, most), (" in the mean", mean, most_in_mean)):
            if not difference <= allowed:  # also true for NaN
                limit = f"allowed {allowed:.3g} (weights.canary_tolerance)"
                self._fail(member, now, f"canary log-probs differ by {difference:.3g}{what}, {limit}", at_fault=True)
                return
        _tell_what_is_left_to_the_canary(member, message.in_use)
        self._commit(member, largest, mean, now)

    def _commit(self, member: Member, canary_max_diff: float, canary_mean_diff: float, now: float) -> None:
        assert self.snapshot is not None
        version, receiver = self.snapshot.version, member.receiver
        member.phase = Phase.COMMITTED
        receiver.held_version = version
        receiver.held_attempt = self.attempt
        receiver.committed_at = now
        receiver.held_digests = self.snapshot.manifest.digests
        receiver.faults = receiver.errors = receiver.taints = 0
        self._emit(ToGenerator(member.name, SyncCommit(self._rules.run_epoch, version, self.attempt)))
        log.debug("%s (incarnation %d) committed version %d", member.name, receiver.incarnation, version)
        total_ms = (now - self._started) * 1e3
        committed = Committed(
            member.name,
            receiver.incarnation,
            version,
            self.attempt,
            total_ms,
            canary_max_diff,
            canary_mean_diff,
            member.timings_ms,
        )
        self._committed.append(committed)
        self._emit(committed)

    # -- failures --------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        if not self._broadcast_over and now >= self._broadcast_deadline:
            self._broadcast_over = True
            why = f"the publisher did not say within {self._rules.timeout_s + GRACE_S:g} s how its broadcast ended"
            log.warning("weight sync in channel %d: %s", self.channel_epoch, why)
            self._break(now, why)
        for member in self._in(Phase.STAGING, Phase.SWAPPING):
            if now < member.deadline:
                continue
            if member.phase is Phase.STAGING:
                self.broken = True
            self._fail(member, now, self._no_answer(member, now), at_fault=True)

    def _no_answer(self, member: Member, now: float) -> str:
        sent = f"; {self._broadcast.num_bytes} bytes were sent" if self._broadcast else ""
        cut = f", the last {GRACE_S:g} s after {self._cut_short}" if self._cut_short else ""
        in_stage = member.phase is Phase.STAGING
        return f"no answer within {now - member.asked_at:.3g} s{cut if in_stage else ''}{sent if in_stage else ''}"

    def _break(self, now: float, why: str) -> None:
        """A collective failed somewhere, and so everywhere: no member is waited for much longer."""
        self.broken = True
        for member in self._in(Phase.STAGING):
            if now + GRACE_S < member.deadline:
                member.deadline, self._cut_short = now + GRACE_S, why

    def _fail(self, member: Member, now: float, reason: str, *, at_fault: bool = False, blame: bool = True) -> None:
        """Ends the round for one member.

        Args:
            member: whom it ends for.
            now: monotonic seconds.
            reason: what went wrong, for the generator and the log.
            at_fault: it failed by its own doing and sits out.
            blame: False for a victim; otherwise it erred, and MAX_ERRORS errors in a row count as a fault.
        """
        if member.phase in (Phase.COMMITTED, Phase.FAILED):
            return
        phase, member.phase = member.phase, Phase.FAILED
        receiver = member.receiver
        tainted = phase is Phase.SWAPPING
        if not self.opening:  # from the offer on, its staging buffer may hold anything
            receiver.staged_version = None
        if tainted:
            receiver.held_version = None
            receiver.taints += at_fault
        if not at_fault:
            receiver.errors += blame
            at_fault = blame and receiver.errors >= MAX_ERRORS
        penalty_s = 0.0
        if at_fault:
            receiver.faults += 1
            penalty_s = min(PENALTY_S * 2 ** (receiver.faults - 1), MAX_PENALTY_S)
            receiver.excluded_until = now + penalty_s
        fatal = receiver.taints >= MAX_TAINTS
        version = -1 if self.snapshot is None else self.snapshot.version
        if not self.opening:
            self._emit(
                ToGenerator(member.name, SyncAbort(self._rules.run_epoch, version, self.attempt, reason, tainted))
            )
        where = "open" if self.opening else phase.value
        text = f"{member.ranks}: {reason}"
        self._emit(SyncFailed(member.name, version, where, text, _remedy(tainted, penalty_s, fatal), fatal))

    def _in(self, *phases: Phase) -> list[Member]:
        return [member for member in self.members.values() if member.phase in phases]

    def _prefix(self) -> str:
        return f"{self._rules.run_name}/{self._rules.run_epoch}/{self.channel_epoch}"


def canary_differences(ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[float, float]:
    """Largest and mean |theirs - ours| over all canary tokens, in nats.

    Infinite when the rows cannot be compared, NaN when a log-prob is.

    Args:
        ours: one row of log-probs for each canary sequence, float32 bytes: the learner's.
        theirs: the same by a worker of the generator.
    """
    if len(ours) != len(theirs) or any(len(a) != len(b) for a, b in zip(ours, theirs, strict=False)):
        return float("inf"), float("inf")
    # One array over all sequences: its maximum is NaN wherever the NaN is, which Python's max would lose.
    diffs = np.abs(np.frombuffer(b"".join(theirs), LOGPROB_DTYPE) - np.frombuffer(b"".join(ours), LOGPROB_DTYPE))
    return float(diffs.max()), float(diffs.mean(dtype=np.float64))


def _wrong_digests(member: Member, told: Sequence[Sequence[int]], expected: list[int]) -> str:
    if len(told) != member.receiver.num_workers:
        return f"digests of {len(told)} workers came, it has {member.receiver.num_workers}"
    wrong = [member.rank + worker for worker, digests in enumerate(told) if list(digests) != expected]
    return f"staged weights differ from the learner's (digest) on rank {', '.join(map(str, wrong))}"


def _wrong_bits(member: Member, told: Sequence[BitsInUse], version: int) -> str:
    """What is wrong with the bits that the workers of a generator compute with; empty if they are those staged."""
    if len(told) != member.receiver.num_workers:
        return f"bits in use of {len(told)} workers came, it has {member.receiver.num_workers}"
    for worker, found in enumerate(told):
        where = f"on rank {member.rank + worker}"
        if found.version != version:
            return f"bits in use {where} were compared with version {found.version}, not {version}"
        if found.differing:
            return f"weights in use {where} are not those that were staged: {', '.join(found.differing)}"
        if found.compared < 1 and not found.not_compared:
            return f"no weight in use {where} was compared with what was staged"
    return ""


def _tell_what_is_left_to_the_canary(member: Member, told: Sequence[BitsInUse]) -> None:
    left = tuple(sorted({each for found in told for each in found.not_compared}))
    if left != member.receiver.left_to_canary:
        member.receiver.left_to_canary = left
        log.warning(
            "%s: some weights in use cannot be compared with the staged bits, the canary alone proves them: %s",
            member.name, "; ".join(left) or "none any more",
        )  # fmt: skip


def _remedy(tainted: bool, penalty_s: float, fatal: bool) -> str:
    if fatal:
        return "it is sent away"
    when = f"in {penalty_s:g} s, on a channel of its own" if penalty_s else "at once"
    return f"{'it holds no version until it proved one; ' if tainted else ''}tried again {when}"

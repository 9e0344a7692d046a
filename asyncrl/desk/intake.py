"""Results on their way in: each is checked, journalled and acknowledged, and goes to the buffer.

    frame → session (seen before?) → validate → lease book (wanted?) → journal, buffer → [durable] → ack
                                                                     ↘ journal: filtered ↗

The order is the promise: nothing is acknowledged, and nothing of it trained, before the journal is durable. A result
that is refused is acknowledged too (as seen), or the generator would send it for ever. With algorithm.dynamic_sampling,
a training group whose rewards are all equal is recorded as filtered and goes no further (`replay.filtering`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from asyncrl.config import Config
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.desk.proofs import Proofs
from asyncrl.desk.run_state import RunState
from asyncrl.errors import ProtocolError
from asyncrl.host.repeats import Repeats
from asyncrl.link.desk_session import DeskSession, Seen
from asyncrl.link.messages import GroupResult, LeaseFailed
from asyncrl.link.rollouts import check_lengths, result_to_group, validate_group
from asyncrl.link.schema.message_base import Message
from asyncrl.link.wire_types import FailureReason, NackCode
from asyncrl.replay.filtering import DynamicSampling, has_equal_rewards
from asyncrl.replay.lease_records import LeaseRecord, Verdict
from asyncrl.storage.records import GroupFiltered, MessageSeen, PromptGivenUp, StoredGroup
from asyncrl.types import Group, LeaseKey, LeaseKind, min_rollouts

log = logging.getLogger(__name__)

WARNINGS_AT_ONCE = 16  # of one kind, said one by one; more within a minute are counted


@dataclass(frozen=True, slots=True)
class Taken:
    """What to do about a result that came in.

    reply is to be sent to its sender at once; None when the acknowledgement alone follows. superseded is a lease that
    runs elsewhere and is needless now: its holder should abandon it.
    """

    reply: Message | None = None
    superseded: LeaseRecord | None = None


class Intake:
    """Takes results: decides what becomes of each, and leaves the acknowledgement to `Acknowledgements`."""

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int,
        state: RunState,
        prompts: LeasedPrompts,
        proofs: Proofs,
        acknowledgements: Acknowledgements,
    ) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._policy = state.policy
        self._leases = state.leases
        self._buffer = state.buffer
        self._journal = state.journal
        self._sessions = state.sessions
        self._counters = state.counters
        self._prompts = prompts
        self._proofs = proofs
        self._tickets = state.tickets
        self._acknowledgements = acknowledgements
        self._sampling: DynamicSampling | None = None
        if config.algorithm.dynamic_sampling:
            self._sampling = DynamicSampling(config.learner.groups_per_step)
        self._said_that_all_is_equal = False
        self._repeats = Repeats(log, WARNINGS_AT_ONCE)

    def group(self, session: DeskSession, message: GroupResult, body: bytes, now: float) -> Taken:
        """One finished lease. `body` is the frame body of the message, which goes to the journal as it is.

        Raises JournalError when the disk fails.
        """
        if self._is_too_early(session, message, now):
            return Taken()  # not acknowledged, so that it comes again
        seen = self._sessions.see(session, message.seq, len(body))
        if seen is not Seen.NEW:
            return self._repeated(session, message.seq, seen)
        issued_version = self._issued_version(session, message)
        if issued_version is None:
            return Taken(self._refuse(session, message.seq, NackCode.UNKNOWN_LEASE, _no_ticket(message), now))
        try:
            sampling = self._config.sampling
            most = max(sampling.group_size, self._config.eval.samples)
            check_lengths(message, max_rollouts=most, max_new_tokens=sampling.max_new_tokens)
            group = result_to_group(message)
            if self._is_late_eval(group.key):
                # Not wrong: the learner that wanted it was restarted, or the evaluation was given up.
                log.debug("%s: %s belongs to no current evaluation", session.generator_id, group.key)
                self._seen(session, message.seq, now)
                return Taken()
            self._check(group, issued_version)
            self._proofs.check(group, session)
        except ProtocolError as error:
            self._fail_lease(message, "invalid", now, str(error))
            return Taken(self._refuse(session, message.seq, NackCode.INVALID, str(error), now))
        verdict, superseded = self._leases.accept(group.key, session.generator_id, now)
        if verdict is Verdict.UNKNOWN:
            what = f"{group.key} is not wanted"
            return Taken(self._refuse(session, message.seq, NackCode.UNKNOWN_LEASE, what, now))
        if verdict is Verdict.DUPLICATE:
            self._seen(session, message.seq, now)
        elif group.key.kind is LeaseKind.EVAL:
            self._seen(session, message.seq, now, evaluated=group)
        else:
            self._take_for_training(session, message.seq, group, issued_version, body, now)
        return Taken(superseded=superseded)

    def failed(self, session: DeskSession, message: LeaseFailed, size: int, now: float) -> Taken:
        """One lease that ended without a group: it is counted by reason and leased again.

        `size` is that of the frame, in bytes. Raises JournalError when the disk fails.
        """
        seen = self._sessions.see(session, message.seq, size)
        if seen is not Seen.NEW:
            return self._repeated(session, message.seq, seen)
        if self._issued_version(session, message) is None:
            return Taken(self._refuse(session, message.seq, NackCode.UNKNOWN_LEASE, _no_ticket(message), now))
        reason = message.reason
        # Of a generator that was set aside this was said once, with the reason.
        if reason is not FailureReason.RETURNED and not self._leases.outcomes.is_set_aside(session.generator_id):
            what = f"{message.kind} {message.ordinal}.{message.attempt}"
            said = f"{session.generator_id}: lease {what} failed ({reason}): {message.detail}"
            self._repeats.warn("a lease failed", said, now)
        self._fail_lease(message, reason, now, message.detail)
        self._seen(session, message.seq, now)
        return Taken()

    def batch_taken(self) -> None:
        """A batch left the buffer: the groups filtered from now on are those of the next one."""
        if self._sampling is not None:
            self._sampling.batch_taken()

    def note_given_up(self, now: float) -> None:
        """Prompts that will get no group any more: journalled, so that a restart does not lease them again."""
        self._repeats.summarise(now)
        for ordinal in self._leases.take_given_up():
            log.error("prompt %d is given up: it failed where other prompts did not", ordinal)
            self._journal.append(PromptGivenUp(ordinal), now)
        for made in self._prompts.take_left_out():
            self._counters.totals.prompts_left_out += 1
            self._journal.append(PromptGivenUp(made.ordinal, made.reason), now)

    def _is_too_early(self, session: DeskSession, message: GroupResult, now: float) -> bool:
        """Whether a result is of a lease of an earlier run epoch, whose prompt is not made again yet."""
        ordinal = message.ordinal
        if message.kind is not LeaseKind.TRAIN or ordinal in self._prompts or self._leases.is_done(ordinal):
            return False
        if not self._leases.in_range(ordinal) or self._issued_version(session, message) is None:
            return False  # it is refused, and no prompt is made for it
        return not self._prompts.is_there(ordinal, now) and not self._leases.is_done(ordinal)

    def _issued_version(self, session: DeskSession, message: GroupResult | LeaseFailed) -> int | None:
        """The version that a lease was issued under; None when it was not granted to the process that answers it."""
        return self._tickets.issued_version(message.ticket, message.key, session.generator_id, session.incarnation)

    def _is_late_eval(self, key: LeaseKey) -> bool:
        evaluation = self._leases.evaluation
        if key.kind is not LeaseKind.EVAL:
            return False
        return evaluation is None or not 0 <= evaluation.prompt_index(key.ordinal) < evaluation.num_prompts

    def _check(self, group: Group, issued_version: int) -> None:
        """Raises ProtocolError unless the group fits what was leased, under `issued_version`."""
        kind, ordinal, _ = group.key
        sampling = self._config.sampling
        pinned = None
        if kind is LeaseKind.EVAL:
            assert self._leases.evaluation is not None, "late results of evaluations are left out before"
            num_rollouts, pinned = self._num_rollouts(kind), self._leases.evaluation.version
        else:
            if not self._leases.in_range(ordinal):
                raise ProtocolError(f"ordinal {ordinal} is outside of this run")
            num_rollouts = len(group.rollouts)
            enough = min_rollouts(sampling.group_size)
            if not enough <= num_rollouts <= sampling.group_size:
                raise ProtocolError(
                    f"{num_rollouts} rollouts in a group of {sampling.group_size}: at least {enough} are needed to "
                    "train on it, and more than were leased cannot be"
                )
        validate_group(
            group,
            vocab_size=self._vocab_size,
            prompt_token_ids=self._prompt_token_ids(group),
            num_rollouts=num_rollouts,
            max_new_tokens=sampling.max_new_tokens,
            oldest_version=issued_version,
            newest_version=self._policy.newest,
            pinned_version=pinned,
            greedy_baseline=kind is LeaseKind.TRAIN and self._config.algorithm.advantage == "remax",
            weights=self._config.reward.weights,
        )

    def _prompt_token_ids(self, group: Group) -> np.ndarray:
        """Those that were leased, int32 [P]. Of a group that is not wanted any more, its own: it goes no further."""
        if group.key.kind is LeaseKind.TRAIN and self._leases.is_done(group.key.ordinal):
            return group.prompt_token_ids
        return self._prompts.of(group.key).token_ids

    def _is_left_out(self, group: Group) -> bool:
        """Whether a training group is filtered. Each group is asked for once: `DynamicSampling` counts."""
        if self._sampling is None:
            return False
        equal = has_equal_rewards(group)
        left_out = self._sampling.leaves_out(equal)
        if equal and not left_out and not self._said_that_all_is_equal:
            self._said_that_all_is_equal = True
            log.warning(
                "since the last batch, %d groups had equal rewards and were filtered, %d had not: the task is solved, "
                "or too hard for this policy, or its reward is constant. Batches are filled up with such groups now, "
                "which teach nothing (said once; see groups_filtered and groups_zero_variance in the metrics)",
                self._sampling.num_filtered,
                self._sampling.num_differing,
            )
        return left_out

    def _take_for_training(
        self, session: DeskSession, seq: int, group: Group, issued_version: int, body: bytes, now: float
    ) -> None:
        self._counters.came_in(issued_version, [rollout.num_tokens for rollout in group.rollouts])
        if self._is_left_out(group):
            _, ordinal, attempt = group.key
            self._journal.append(GroupFiltered(session.generator_id, session.incarnation, seq, ordinal, attempt), now)
            self._leases.filter(group.key)
            self._counters.totals.groups_filtered += 1
            self._counters.totals.tokens_filtered += group.num_tokens
        else:
            stored = _stored(session, seq, group, issued_version, body)
            self._journal.append(stored, now)
            # At once, or the group would count as neither running nor buffered until it is durable. Safe before that:
            # a batch is dealt out only after its own record, which is behind this one, is on disk.
            self._buffer.add(stored)
        self._acknowledgements.add(session, seq, num_rollouts=len(group.rollouts))

    def _repeated(self, session: DeskSession, seq: int, seen: Seen) -> Taken:
        """Answers a result that was settled before once more. One still being written, or over the credit, waits."""
        return Taken(self._sessions.answer_duplicate(session, seq) if seen is Seen.DUPLICATE else None)

    def _fail_lease(self, message: GroupResult | LeaseFailed, reason: str, now: float, detail: str) -> None:
        self._counters.lease_failed(reason, self._num_rollouts(message.kind))
        self._leases.fail(message.key, reason, now, detail)

    def _num_rollouts(self, kind: LeaseKind) -> int:
        """Of a lease of this kind."""
        return self._config.sampling.group_size if kind is LeaseKind.TRAIN else self._config.eval.samples

    def _refuse(self, session: DeskSession, seq: int, code: NackCode, reason: str, now: float) -> Message:
        self._repeats.warn("a result refused", f"{session.generator_id}: result {seq} refused ({code}): {reason}", now)
        self._journal.append(MessageSeen(session.generator_id, session.incarnation, seq), now)
        return self._sessions.reject(session, seq, code, reason[:500])

    def _seen(self, session: DeskSession, seq: int, now: float, evaluated: Group | None = None) -> None:
        self._journal.append(MessageSeen(session.generator_id, session.incarnation, seq), now)
        self._acknowledgements.add(session, seq, evaluated=evaluated)


def _no_ticket(message: GroupResult | LeaseFailed) -> str:
    what = f"{message.kind} {message.ordinal}.{message.attempt}"
    return f"the ticket does not prove that lease {what} was granted to this process of the generator by this run"


def _stored(session: DeskSession, seq: int, group: Group, issued_version: int, body: bytes) -> StoredGroup:
    """The record of an accepted group, whose lease was issued under `issued_version`."""
    return StoredGroup(
        generator_id=session.generator_id,
        incarnation=session.incarnation,
        seq=seq,
        ordinal=group.key.ordinal,
        attempt=group.key.attempt,
        issued_version=issued_version,
        oldest_version=group.oldest_version,
        newest_version=max(rollout.newest_version for rollout in group.rollouts),
        num_tokens=tuple(rollout.num_tokens for rollout in group.rollouts),
        body=body,
    )

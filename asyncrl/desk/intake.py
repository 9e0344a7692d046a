"""The rollout side of the desk: results come in, are checked, journalled and acknowledged, and go to the buffer.

    frame → session (seen before?) → validate → lease desk (wanted?) → journal, buffer → [sync] → ack
                                                                     ↘ journal: filtered ↗

The order is the promise: nothing is acknowledged, and nothing of it trained, before the journal's sync. A result that
is refused is acknowledged too (as seen), or the generator would send it for ever. With algorithm.dynamic_sampling, a
training group whose rewards are all equal is recorded as filtered and goes no further (`replay.filtering`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncrl.config import Config
from asyncrl.desk.counters import Counters
from asyncrl.errors import ProtocolError
from asyncrl.link.messages import FAILURE_REASONS, GroupResult, LeaseFailed, Message
from asyncrl.link.rollouts import result_to_group, validate_group
from asyncrl.link.session import DeskSession, DeskSessions, Offer
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.filtering import DynamicSampling, has_equal_rewards
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.lease_records import LeaseRecord, Verdict
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import GroupFiltered, MessageSeen, PromptGivenUp, StoredGroup
from asyncrl.tasks.prompts import Prompt, PromptSource
from asyncrl.types import Group, LeaseKey, LeaseKind

log = logging.getLogger(__name__)

MIN_ROLLOUTS_SHARE = 0.5  # of group_size: a training group with fewer scored rollouts is not worth a gradient


@dataclass(slots=True)
class _Pending:
    """What becomes true once the journal is synced."""

    session: DeskSession
    seq: int
    num_rollouts: int = 0  # for training
    evaluated: Group | None = None


def _nobody(news: object) -> None:
    """Stands in until the desk is put together."""


@dataclass(slots=True)
class Intake:
    """Takes results until they are durable. `on_eval` gets each evaluated group, `on_cancel` needless leases."""

    config: Config
    vocab_size: int
    prompts: PromptSource
    evals: list[Prompt]
    leases: LeaseBook
    buffer: ReplayBuffer
    journal: Journal
    account: Counters
    sessions: DeskSessions
    on_eval: Callable[[Group], None] = _nobody
    on_cancel: Callable[[LeaseRecord], None] = _nobody
    newest_version: int = 0  # no token can be newer
    proven_before: int = -1  # up to this one, versions were proven to an earlier learner of the run
    _proven: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)
    _sampling: DynamicSampling | None = field(init=False, default=None)
    _said_that_all_is_equal: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.config.algorithm.dynamic_sampling:
            self._sampling = DynamicSampling(self.config.learner.groups_per_step)

    def prompt_of(self, key: LeaseKey) -> Prompt:
        """The prompt that a lease is about."""
        if key.kind is LeaseKind.TRAIN:
            return self.prompts.train(key.ordinal)
        assert self.leases.evaluation is not None, "eval leases belong to an evaluation"
        return self.evals[self.leases.evaluation.prompt_index(key.ordinal)]

    def group(self, session: DeskSession, message: GroupResult, body: bytes, now: float) -> Message | None:
        """One finished lease. Returns what to answer at once; the acknowledgement follows the journal's sync."""
        offer = self.sessions.offer(session, message.seq, len(body))
        if offer is not Offer.NEW:
            return self._repeated(session, message.seq, offer)
        try:
            group = result_to_group(message)
            if self._is_late_eval(group.key):
                # Not wrong: the learner that wanted it was restarted, or the evaluation was given up.
                log.debug("%s: %s belongs to no current evaluation", session.generator_id, group.key)
                self._seen(session, message.seq, now)
                return None
            self._check(group)
            self._check_proofs(group, session)
        except ProtocolError as error:
            self._fail_lease(message, "invalid", now)
            return self._refuse(session, message.seq, "invalid", str(error), now)
        acceptance = self.leases.accept(group.key)
        if acceptance.superseded:
            self.on_cancel(acceptance.superseded)
        if acceptance.verdict is Verdict.UNKNOWN:
            return self._refuse(session, message.seq, "unknown_lease", f"{group.key} is not wanted", now)
        if acceptance.verdict is Verdict.DUPLICATE:
            self._seen(session, message.seq, now)
        elif group.key.kind is LeaseKind.EVAL:
            self._seen(session, message.seq, now, evaluated=group)
        else:
            if self._is_left_out(group):
                self._filter(session, message.seq, group, now)
            else:
                self._keep(_stored(session, message.seq, group, body), now)
            self._pending.append(_Pending(session, message.seq, num_rollouts=len(group.rollouts)))
        return None

    def failed(self, session: DeskSession, message: LeaseFailed, size: int, now: float) -> Message | None:
        """One lease that ended without a group: a state that is counted, and leased again."""
        offer = self.sessions.offer(session, message.seq, size)
        if offer is not Offer.NEW:
            return self._repeated(session, message.seq, offer)
        reason = message.reason if message.reason in FAILURE_REASONS else "engine"
        if reason != "returned":
            what = f"{message.kind} {message.ordinal}.{message.attempt}"
            log.warning("%s: lease %s failed (%s): %s", session.generator_id, what, reason, message.detail)
        self._fail_lease(message, reason, now)
        self._seen(session, message.seq, now)
        return None

    def batch_taken(self) -> None:
        """A batch left the buffer: the groups filtered from now on are those of the next one."""
        if self._sampling is not None:
            self._sampling.batch_taken()

    def note_given_up(self, now: float) -> None:
        """Prompts that will get no group any more: journalled, so that a restart does not lease them again."""
        for ordinal in self.leases.take_given_up():
            log.error("prompt %d is given up: too many of its leases failed", ordinal)
            self.journal.append(PromptGivenUp(ordinal), now)

    def sync_if_due(self, now: float) -> list[DeskSession]:
        """Group commit. Returns the sessions that have something new to be acknowledged."""
        if self.journal.next_sync_due > now:
            return []
        return self.sync()

    def sync(self) -> list[DeskSession]:
        """Makes everything taken so far durable, then lets it count. Returns the sessions to acknowledge."""
        self.journal.sync()
        pending, self._pending = self._pending, []
        for item in pending:
            self.sessions.mark_durable(item.session, item.seq)
            self.account.rollouts_acked += item.num_rollouts
            if item.evaluated is not None:
                self.on_eval(item.evaluated)
        return list({item.session.generator_id: item.session for item in pending}.values())

    def note_proof(self, generator_id: str, incarnation: int, version: int) -> None:
        """This generator proved `version` here: from now on it may bring tokens of it."""
        self._proven.setdefault((generator_id, incarnation), set()).add(version)

    def _check_proofs(self, group: Group, session: DeskSession) -> None:
        """Raises ProtocolError unless the generator proved every version that it says its tokens are of."""
        proven = self._proven.get((session.generator_id, session.incarnation), set())
        versions = {span.version for rollout in group.rollouts for span in rollout.version_spans}
        if unproven := sorted(v for v in versions - proven if v > self.proven_before):
            raise ProtocolError(
                f"{group.key} has tokens of versions {unproven}, which {session.generator_id} (incarnation "
                f"{session.incarnation}) never proved; proven are {sorted(proven)[-5:]} (the newest five)"
            )

    def _is_late_eval(self, key: LeaseKey) -> bool:
        evaluation = self.leases.evaluation
        if key.kind is not LeaseKind.EVAL:
            return False
        return evaluation is None or not 0 <= evaluation.prompt_index(key.ordinal) < evaluation.num_prompts

    def _check(self, group: Group) -> None:
        """Raises ProtocolError unless the group fits what was leased."""
        kind, ordinal, _ = group.key
        sampling = self.config.sampling
        pinned = None
        if kind is LeaseKind.EVAL:
            assert self.leases.evaluation is not None, "late results of evaluations are left out before"
            num_rollouts, pinned = 1, self.leases.evaluation.version
        else:
            if not self.leases.in_range(ordinal):
                raise ProtocolError(f"ordinal {ordinal} is outside of this run")
            num_rollouts = len(group.rollouts)
            if not min(2, sampling.group_size) <= num_rollouts <= sampling.group_size:
                raise ProtocolError(f"{num_rollouts} rollouts in a group of {sampling.group_size}")
            if num_rollouts < sampling.group_size * MIN_ROLLOUTS_SHARE:
                raise ProtocolError(f"{num_rollouts} rollouts of {sampling.group_size} are too few to train on")
        validate_group(
            group,
            vocab_size=self.vocab_size,
            prompt_token_ids=self.prompt_of(group.key).token_ids,
            num_rollouts=num_rollouts,
            max_new_tokens=sampling.max_new_tokens,
            oldest_version=0,
            newest_version=self.newest_version,
            pinned_version=pinned,
            greedy_baseline=kind is LeaseKind.TRAIN and self.config.algorithm.advantage == "remax",
        )

    def _is_left_out(self, group: Group) -> bool:
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

    def _keep(self, stored: StoredGroup, now: float) -> None:
        self.journal.append(stored, now)
        # At once, or the group would count as neither running nor buffered until the sync. Safe before it: a
        # batch is dealt out only after its own record, which is behind this one, is on disk.
        self.buffer.add(stored)

    def _filter(self, session: DeskSession, seq: int, group: Group, now: float) -> None:
        _, ordinal, attempt = group.key
        self.journal.append(GroupFiltered(session.generator_id, session.incarnation, seq, ordinal, attempt), now)
        self.leases.filter(group.key)
        self.account.groups_filtered += 1
        self.account.tokens_filtered += group.num_tokens

    def _repeated(self, session: DeskSession, seq: int, offer: Offer) -> Message | None:
        """Settled before: say so again. Being written or beyond the credit: the answer comes with the next ack."""
        return self.sessions.answer_duplicate(session, seq) if offer is Offer.DUPLICATE else None

    def _fail_lease(self, message: GroupResult | LeaseFailed, reason: str, now: float) -> None:
        self.account.lease_failed(reason, self.config.sampling.group_size if message.kind == LeaseKind.TRAIN else 1)
        if message.kind in tuple(LeaseKind):
            self.leases.fail(LeaseKey(LeaseKind(message.kind), message.ordinal, message.attempt), reason, now)

    def _refuse(self, session: DeskSession, seq: int, code: str, reason: str, now: float) -> Message:
        self.account.results_refused += 1
        log.warning("%s: result %d refused (%s): %s", session.generator_id, seq, code, reason)
        self.journal.append(MessageSeen(session.generator_id, session.incarnation, seq), now)
        return self.sessions.reject(session, seq, code, reason[:500])

    def _seen(self, session: DeskSession, seq: int, now: float, evaluated: Group | None = None) -> None:
        self.journal.append(MessageSeen(session.generator_id, session.incarnation, seq), now)
        self._pending.append(_Pending(session, seq, evaluated=evaluated))


def _stored(session: DeskSession, seq: int, group: Group, body: bytes) -> StoredGroup:
    return StoredGroup(
        generator_id=session.generator_id,
        incarnation=session.incarnation,
        seq=seq,
        ordinal=group.key.ordinal,
        attempt=group.key.attempt,
        issued_version=group.oldest_version,
        oldest_version=group.oldest_version,
        newest_version=max(rollout.newest_version for rollout in group.rollouts),
        num_tokens=tuple(rollout.num_tokens for rollout in group.rollouts),
        body=body,
    )

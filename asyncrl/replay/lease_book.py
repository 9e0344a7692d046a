"""The lease book: which generator may work on which prompt, and what becomes of each prompt.

How many leases may be out is the rule of `replay.pacing`; nothing here waits, sends or reads a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from asyncrl.replay.eval_leases import EvalLeases, EvalProgress
from asyncrl.replay.lease_records import (
    ATTEMPTS_PER_EPOCH,
    NOBODYS_FAULT,
    Acceptance,
    LeaseRecord,
    Reconciled,
    SavedLeases,
    Verdict,
    blame,
    first_attempt,
    is_beyond_help,
)
from asyncrl.replay.outcomes import Blame, Outcomes
from asyncrl.replay.pacing import Pacing
from asyncrl.replay.running_leases import RunningLeases
from asyncrl.replay.waiting_prompts import WaitingPrompts
from asyncrl.types import Frontier, LeaseKey, LeaseKind

# Leases of one ordinal in one run epoch, for whatever reason they fail: a prompt that kills its generator ends too.
MAX_ATTEMPTS = 32
BACKOFF_S = 1.0  # after a failure that may be the prompt's doing; doubles
MAX_BACKOFF_S = 16.0
RECONCILE_AFTER_S = 5.0  # a grant younger than this may still be on its way when the generator beats
# A trial of a generator that was set aside ends after this many times the mean duration of a lease: until then the
# learner may have to wait for it.
TRIAL_DURATIONS = 4.0
MIN_TRIAL_S = 2.0
_MEAN_WEIGHT = 0.1  # of the newest lease in the running mean of durations


class LeaseBook:
    """Grants, tracks and re-grants leases. Single-threaded; `now` is monotonic seconds.

    Every training ordinal is in exactly one place: not leased yet, waiting to be leased again, running,
    accepted (its group is in the buffer), settled (trained, given up, filtered or left out).
    """

    def __init__(self, pacing: Pacing, lease_timeout_s: float, run_epoch: int = 1) -> None:
        self._pacing = pacing
        self._lease_timeout_s = lease_timeout_s
        self._first_attempt = first_attempt(run_epoch)
        self._next_ordinal = 0
        self._waiting = WaitingPrompts()
        self._running = RunningLeases()
        self._running_by_version: Counter[int] = Counter()
        self._accepted: dict[int, int] = {}  # ordinal -> attempt
        self._settled = Frontier()
        self._given_up: set[int] = set()
        self._num_filtered = 0
        self.paused = False  # no training leases are granted: there is no room for what they bring
        self.num_left_out = 0  # ordinals whose example no prompt can be made of
        self._given_up_news: list[int] = []
        self._tries: Counter[int] = Counter()
        self._strikes: dict[int, Counter[str]] = {}  # ordinal -> generator -> strikes
        self._failures: Counter[int] = Counter()  # by ordinal: those that may be the prompt's own
        self._mean_lease_s: float | None = None  # how long leases take that end with a group
        self.outcomes = Outcomes()
        self._evals = EvalLeases(lease_timeout_s, run_epoch, 0)

    # -- what stands -----------------------------------------------------------------------------------------

    @property
    def num_trained(self) -> int:
        """Groups trained, those of the batch in training included."""
        return len(self._settled) - self.num_given_up - self.num_filtered - self.num_left_out

    @property
    def num_running(self) -> int:
        """Running training leases."""
        return len(self._running)

    @property
    def num_admitted(self) -> int:
        """Groups trained, in training, buffered and running: what admission counts."""
        return self.num_trained + len(self._accepted) + self.num_running

    @property
    def num_given_up(self) -> int:
        """Prompts that got no group after all their attempts."""
        return len(self._given_up)

    @property
    def num_filtered(self) -> int:
        """Prompts whose group was left out: its rewards were equal, or it was of a batch that killed the trainer."""
        return self._num_filtered

    @property
    def running_by_version(self) -> Mapping[int, int]:
        """How many running training leases were issued at each version."""
        return self._running_by_version

    def running(self) -> list[LeaseRecord]:
        """Running training leases, oldest grant first."""
        return list(self._running)

    def in_range(self, ordinal: int) -> bool:
        """Ordinals the run can need: one for each group it trains on, one more for each that is without a group."""
        return 0 <= ordinal < self._end

    @property
    def _end(self) -> int:
        return self._pacing.total_groups + self.num_given_up + self.num_filtered + self.num_left_out

    def is_done(self, ordinal: int) -> bool:
        """Whether an ordinal needs no lease any more: its group is there, or it is settled."""
        return ordinal in self._accepted or ordinal in self._settled

    def is_settled(self, ordinal: int) -> bool:
        """Whether an ordinal is finished with: its group does not wait for a step either."""
        return ordinal in self._settled

    def upcoming(self, count: int) -> list[int]:
        """Ordinals that are leased next, the very next one among them, and up to `count` of those after all others."""
        end = min(self._next_ordinal + count, self._end)
        return self._waiting.some_due(count) + self._settled.missing(self._next_ordinal, end)

    def next_deadline(self, now: float) -> float:
        """When `expire` has something to do, a back-off ends or a trial is due; infinity when never."""
        return min(
            self._running.next_deadline(),
            self._waiting.next_time(now),
            self._evals.next_deadline(),
            self.outcomes.next_trial(now),
        )

    # -- a lease's life --------------------------------------------------------------------------------------

    def may_grant(self, newest_version: int) -> bool:
        """Whether any generator could get a lease: one that holds `newest_version`, or one for the evaluation."""
        return self._evals.any_waiting or (not self.paused and self.num_admitted < self._pacing.ceiling(newest_version))

    def grant(
        self,
        holder: str,
        held_version: int | None,
        room: int,
        learner_version: int,
        now: float,
        is_there: Callable[[int], bool] = lambda ordinal: True,
    ) -> list[LeaseRecord]:
        """Up to `room` leases for a generator that proved `held_version` (None: nothing proved, no leases).

        Eval leases come first. Nothing is granted beyond the groups of the last step. A generator that was set aside
        (`replay.outcomes`) gets one lease for a trial, or none. is_there says whether the prompt of a training ordinal
        is; where it is not, nothing is granted beyond it.
        """
        room = self.outcomes.room(holder, room, now)
        if held_version is None or room <= 0:
            return []
        issued_version = min(held_version, learner_version)
        leases = self._evals.grant(holder, held_version, room, now)
        ceiling = self._pacing.ceiling(issued_version)
        while len(leases) < room and self.num_admitted < ceiling and not self.paused:
            ordinal = self._first_to_lease(now)
            if ordinal is None or not is_there(ordinal):
                break
            self._waiting.discard(ordinal)
            self._next_ordinal = max(self._next_ordinal, ordinal + 1)
            key = LeaseKey(LeaseKind.TRAIN, ordinal, self._first_attempt + self._tries[ordinal])
            self._tries[ordinal] += 1
            leases.append(self._start(key, holder, issued_version, now))
        for lease in leases:
            self.outcomes.granted(holder, lease.key)
        return leases

    def adopt(self, holder: str, key: LeaseKey, issued_version: int, now: float) -> bool:
        """Takes over a lease of an earlier run epoch that a generator works on, by the rule of `grant`.

        False when it is not needed or does not fit: have it abandoned.
        """
        ordinal = key.ordinal
        if (
            key.kind != LeaseKind.TRAIN
            or not 0 <= key.attempt < self._first_attempt
            or not self._maybe_leased_before(ordinal)
            or ordinal in self._running
            or self.is_done(ordinal)
            or self.num_admitted >= self._pacing.ceiling(issued_version)
        ):
            return False
        self._learn_of(ordinal)
        self._waiting.discard(ordinal)
        self._start(key, holder, issued_version, now)
        return True

    def accept(self, key: LeaseKey, by: str = "", now: float = 0.0) -> Acceptance:
        """A valid group came in for `key`. The first of its ordinal wins, even if its lease has expired.

        `by` is the generator that brought it; empty where that is not known.
        """
        accepted = self._evals.accept(key) if key.kind == LeaseKind.EVAL else self._accept(key, now)
        if accepted.superseded is not None:
            self.outcomes.took_back(accepted.superseded.holder, accepted.superseded.key, now)
        if by and accepted.verdict is not Verdict.UNKNOWN:
            self.outcomes.succeeded(by, key)
        return accepted

    def _accept(self, key: LeaseKey, now: float) -> Acceptance:
        if key.ordinal in self._given_up or not self._may_have_been_granted(key):
            return Acceptance(Verdict.UNKNOWN)
        if key.ordinal in self._accepted or key.ordinal in self._settled:
            return Acceptance(Verdict.DUPLICATE)
        self._learn_of(key.ordinal)
        running = self._running.get(key.ordinal)
        if running is not None:
            self._stop(running)
        self._waiting.discard(key.ordinal)
        self._accepted[key.ordinal] = key.attempt
        if running is None or running.key != key:
            return Acceptance(Verdict.ACCEPTED, running)
        took_s = now - running.granted_at
        mean_s = took_s if self._mean_lease_s is None else self._mean_lease_s
        self._mean_lease_s = mean_s + _MEAN_WEIGHT * (took_s - mean_s)
        return Acceptance(Verdict.ACCEPTED)

    def fail(self, key: LeaseKey, reason: str, now: float, detail: str = "") -> bool:
        """A lease ended without a group: its ordinal is leased again, or given up when too much failed.

        False when the lease was not running (expired, leased again): the news is late and changes nothing.
        """
        if key.kind == LeaseKind.EVAL:
            return self._fail_eval(key, reason, detail, now)
        record = self._running.get(key.ordinal)
        if record is None or record.key != key:
            return False
        self._stop(record)
        alone = self._judge(record, reason, detail, now) is not Blame.NONE
        backoff_s = 0.0
        if blame(reason):
            backoff_s = min(BACKOFF_S * 2 ** self._failures[key.ordinal], MAX_BACKOFF_S)
            self._failures[key.ordinal] += 1
        self._lease_again(key.ordinal, now, backoff_s, alone)
        return True

    def _fail_eval(self, key: LeaseKey, reason: str, detail: str, now: float) -> bool:
        record = self._evals.get(key)
        if record is None:
            return False
        verdict = self._judge(record, reason, detail, now)
        self._evals.fail(record, now, held_against_prompt=verdict is not Blame.NONE or reason in NOBODYS_FAULT)
        return True

    def _judge(self, record: LeaseRecord, reason: str, detail: str, now: float) -> Blame:
        """Notes a failure for or against its generator and its prompt."""
        if reason in NOBODYS_FAULT:
            self.outcomes.took_back(record.holder, record.key, now)
            return Blame.NONE
        took_s = now - record.granted_at
        verdict = self.outcomes.failed(record.holder, record.key, reason, detail, now, took_s)
        if verdict is Blame.STRIKE and blame(reason) and record.key.kind is LeaseKind.TRAIN:
            self._strikes.setdefault(record.key.ordinal, Counter())[record.holder] += 1
        return verdict

    def expire(self, now: float) -> list[LeaseRecord]:
        """Fails every lease past its deadline and returns them: their holders should abandon them."""
        expired = self._running.past_deadline(now) + self._evals.past_deadline(now)
        return self._fail_all(expired, "expired", now)

    def release(self, holder: str, now: float) -> list[LeaseRecord]:
        """Puts back all leases of a generator that left, died or was fenced."""
        return self._fail_all(self._leases_of(holder), "released", now)

    def holds_exactly(self, holder: str, keys: Collection[LeaseKey]) -> bool:
        """Whether these are all leases that a generator holds."""
        return {record.key for record in self._leases_of(holder)} == set(keys)

    def last_change(self, holder: str) -> tuple[int, int]:
        """Another value after each change of the leases that a generator holds."""
        return self._running.last_change(holder), self._evals.last_change(holder)

    def num_held(self, holder: str) -> int:
        """Training leases that a generator holds."""
        return self._running.num_of(holder)

    def reconcile(self, holder: str, active_keys: Collection[LeaseKey], now: float) -> Reconciled:
        """Compares with the leases a beat lists; those it should know but does not are put back."""
        active = set(active_keys)
        mine = self._leases_of(holder)
        lost = [r for r in mine if r.key not in active and now - r.granted_at > RECONCILE_AFTER_S]
        unexpected = sorted(active - {record.key for record in mine})
        return Reconciled(self._fail_all(lost, "lost", now), unexpected)

    # -- a group's life --------------------------------------------------------------------------------------

    def drop(self, key: LeaseKey, now: float) -> None:
        """An accepted group was over-age and leaves the buffer untrained: its ordinal is leased again."""
        assert self._accepted.get(key.ordinal) == key.attempt, f"{key} is not in the buffer"
        del self._accepted[key.ordinal]
        self._lease_again(key.ordinal, now, 0.0, alone=False)

    def train(self, keys: Iterable[LeaseKey]) -> None:
        """A batch of accepted groups was taken for training; they will never be leased again."""
        for key in keys:
            assert self._accepted.get(key.ordinal) == key.attempt, f"{key} is not in the buffer"
            del self._accepted[key.ordinal]
            self._settle(key.ordinal)

    def filter(self, key: LeaseKey) -> None:
        """An accepted group is not worth training on: its ordinal is settled, and a new one takes its slot."""
        assert self._accepted.get(key.ordinal) == key.attempt, f"{key} is not accepted"
        del self._accepted[key.ordinal]
        self._settle(key.ordinal)
        self._num_filtered += 1

    def leave_out(self, ordinals: Iterable[int]) -> None:
        """Groups of a batch that was taken cannot be trained: like filtered ones, each makes room for a new ordinal."""
        for ordinal in ordinals:
            assert ordinal in self._settled and ordinal not in self._given_up, f"{ordinal} was not trained"
            self._num_filtered += 1

    def settle_without_prompt(self, ordinal: int, now: float) -> LeaseRecord | None:
        """No prompt can be made of this ordinal's example: it is settled, and a new one takes its slot.

        Returns the lease of it that ran, of an earlier run epoch: its holder should abandon it.
        """
        assert not self.is_done(ordinal), f"{ordinal} needs no prompt any more"
        running = self._running.get(ordinal)
        if running is not None:
            self._stop(running)
            self.outcomes.took_back(running.holder, running.key, now)
        self._waiting.discard(ordinal)
        self._settle(ordinal)
        self.num_left_out += 1
        return running

    def take_given_up(self) -> list[int]:
        """Ordinals given up since the last call, for the journal."""
        news, self._given_up_news = self._given_up_news, []
        return news

    # -- evaluation ------------------------------------------------------------------------------------------

    @property
    def evaluation(self) -> EvalProgress | None:
        """The latest evaluation of this run epoch, done or not."""
        return self._evals.current

    @property
    def eval_is_running(self) -> bool:
        """Whether an evaluation was started and is not done."""
        return self._evals.current is not None and not self._evals.current.done

    def start_eval(self, version: int, num_prompts: int, timeout_s: float, now: float) -> EvalProgress:
        """Starts an evaluation; its leases go first, and only to generators that hold exactly `version`."""
        return self._evals.start(version, num_prompts, timeout_s, now)

    def abandon_eval(self) -> None:
        """Gives up the prompts of the evaluation that are not answered or running."""
        self._evals.abandon()

    def eval_holders(self, held_versions: Mapping[str, int | None]) -> set[str]:
        """Generators that must not swap weights: they run eval leases, or waiting ones need their version."""
        return self._evals.holders(held_versions)

    # -- checkpoint ------------------------------------------------------------------------------------------

    def state(self) -> SavedLeases:
        """What a checkpoint must hold; it does not change with this book."""
        return SavedLeases(
            next_ordinal=self._next_ordinal,
            next_eval_ordinal=self._evals.next_ordinal,
            settled=self._settled.copy(),
            given_up=sorted(self._given_up),
            num_filtered=self._num_filtered,
            num_left_out=self.num_left_out,
            failures={ordinal: strikes.total() for ordinal, strikes in sorted(self._strikes.items())},
        )

    def restore(
        self,
        state: SavedLeases | None,
        trained: Iterable[int],
        accepted: Iterable[LeaseKey],
        given_up: Iterable[int],
        filtered: Iterable[int],
        left_out: Iterable[int] = (),
    ) -> None:
        """Continues from a checkpoint's state (None: from nothing) and what the journal adds to it.

        trained   ordinals of the steps that are trained again from the journal
        accepted  groups that go back to the buffer
        given_up  ordinals given up since the checkpoint
        filtered  ordinals filtered since the checkpoint; earlier ones among these change nothing
        left_out  ordinals left out since the checkpoint; the same
        What was running is leased again, unless a generator that works on it is heard of first (`adopt`).
        """
        assert self._next_ordinal == 0, "restore comes before the first grant"
        if state is not None:
            self._next_ordinal = state.next_ordinal
            self._evals.next_ordinal = state.next_eval_ordinal
            self._settled = state.settled.copy()
            self._given_up = set(state.given_up)
            self._num_filtered = state.num_filtered
            self.num_left_out = state.num_left_out
            self._strikes = {ordinal: Counter({"": count}) for ordinal, count in state.failures.items()}
        for ordinal in given_up:
            if ordinal not in self._settled:
                self._settle(ordinal)
                self._given_up.add(ordinal)
        self._num_filtered += self._settle_all(filtered)
        self.num_left_out += self._settle_all(left_out)
        for ordinal in trained:
            self._settle(ordinal)
        self._accepted = {key.ordinal: key.attempt for key in accepted if key.ordinal not in self._settled}
        known = [self._next_ordinal - 1, self._settled.watermark - 1, *self._settled.above, *self._accepted]
        self._next_ordinal = 1 + max(known)
        unfinished = range(self._settled.watermark, self._next_ordinal)
        self._waiting = WaitingPrompts(n for n in unfinished if n not in self._settled and n not in self._accepted)

    # -- inside ----------------------------------------------------------------------------------------------

    def _first_to_lease(self, now: float) -> int | None:
        """The ordinal whose turn it is; None when there is none."""
        if (ordinal := self._waiting.first(now)) is not None:
            return ordinal
        while self._next_ordinal in self._settled:  # left out ahead of its turn
            self._next_ordinal += 1
        return self._next_ordinal if self.in_range(self._next_ordinal) else None

    def _start(self, key: LeaseKey, holder: str, issued_version: int, now: float) -> LeaseRecord:
        timeout_s = self._lease_timeout_s
        if self.outcomes.is_set_aside(holder) and self._mean_lease_s is not None:
            timeout_s = min(timeout_s, max(MIN_TRIAL_S, TRIAL_DURATIONS * self._mean_lease_s))
        record = LeaseRecord(key, holder, issued_version, now, now + timeout_s)
        self._running.add(record)
        self._running_by_version[issued_version] += 1
        return record

    def _stop(self, record: LeaseRecord) -> None:
        self._running.remove(record)
        self._running_by_version[record.issued_version] -= 1
        if not self._running_by_version[record.issued_version]:
            del self._running_by_version[record.issued_version]

    def _lease_again(self, ordinal: int, now: float, backoff_s: float, alone: bool) -> None:
        """`alone` says of a failure that its generator failed on nothing else since its last success."""
        strikes = self._strikes.get(ordinal, Counter())
        if self._tries[ordinal] < MAX_ATTEMPTS and not is_beyond_help(strikes, self._failures[ordinal], alone):
            self._waiting.add(ordinal, now + backoff_s, now)
            return
        self._settle(ordinal)
        self._given_up.add(ordinal)
        self._given_up_news.append(ordinal)

    def _settle(self, ordinal: int) -> None:
        self._settled.add(ordinal)
        self._tries.pop(ordinal, None)
        self._failures.pop(ordinal, None)
        self._strikes.pop(ordinal, None)

    def _settle_all(self, ordinals: Iterable[int]) -> int:
        """Settles what is not settled; returns how many it were."""
        before = len(self._settled)
        for ordinal in ordinals:
            self._settle(ordinal)
        return len(self._settled) - before

    def _leases_of(self, holder: str) -> list[LeaseRecord]:
        return self._running.of(holder) + self._evals.running_of(holder)

    def _fail_all(self, records: list[LeaseRecord], reason: str, now: float) -> list[LeaseRecord]:
        for record in records:
            self.fail(record.key, reason, now)
        return records

    def _maybe_leased_before(self, ordinal: int) -> bool:
        """Whether an earlier run epoch may have leased the ordinal: it lies no further ahead than leases can be out."""
        reach = (self._pacing.max_age + 1) * self._pacing.groups_per_step
        return self.in_range(ordinal) and ordinal < self._next_ordinal + reach

    def _may_have_been_granted(self, key: LeaseKey) -> bool:
        """Whether the key was granted: known in this run epoch, assumed of what is plausible of an earlier one."""
        if key.ordinal in self._settled:
            return True
        if key.attempt < self._first_attempt:
            return key.attempt >= 0 and self._maybe_leased_before(key.ordinal)
        return key.attempt - self._first_attempt < self._tries[key.ordinal]

    def _learn_of(self, ordinal: int) -> None:
        """An earlier run epoch had leased this ordinal, hence all before it: those not known yet wait to be leased."""
        while self._next_ordinal <= ordinal:
            if self._next_ordinal not in self._settled:
                self._waiting.add(self._next_ordinal, 0.0, 0.0)
            self._next_ordinal += 1


assert MAX_ATTEMPTS < ATTEMPTS_PER_EPOCH

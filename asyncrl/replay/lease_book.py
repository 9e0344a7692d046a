"""The lease book: which generator may work on which prompt, and what becomes of each prompt.

How many leases may be out is the rule of `replay.pacing`; nothing here waits, sends or reads a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from asyncrl.replay.eval_leases import EvalLeases, EvalProgress
from asyncrl.replay.lease_records import (
    ATTEMPTS_PER_EPOCH,
    Acceptance,
    LeaseRecord,
    Reconciled,
    SavedLeases,
    Verdict,
    blame,
    first_attempt,
)
from asyncrl.replay.pacing import Pacing
from asyncrl.types import Frontier, LeaseKey, LeaseKind

MAX_BLAMED_FAILURES = 3
# Leases of one ordinal in one run epoch, for whatever reason they fail: a prompt that kills its generator ends too.
MAX_ATTEMPTS = 32
BACKOFF_S = 1.0  # after a failure that may be the prompt's doing; doubles
RECONCILE_AFTER_S = 5.0  # a grant younger than this may still be on its way when the generator beats


class LeaseBook:
    """Grants, tracks and re-grants leases. Single-threaded; `now` is monotonic seconds.

    Every training ordinal is in exactly one place: not leased yet, waiting to be leased again, running,
    accepted (its group is in the buffer), settled (trained, given up or filtered).
    """

    def __init__(self, pacing: Pacing, lease_timeout_s: float, run_epoch: int = 1) -> None:
        self._pacing = pacing
        self._lease_timeout_s = lease_timeout_s
        self._first_attempt = first_attempt(run_epoch)
        self._next_ordinal = 0
        self._waiting: dict[int, float] = {}  # ordinal -> not before
        self._running: dict[int, LeaseRecord] = {}  # in order of grant, which is the order of deadlines
        self._running_by_version: Counter[int] = Counter()
        self._accepted: dict[int, int] = {}  # ordinal -> attempt
        self._settled = Frontier()
        self._given_up: set[int] = set()
        self._num_filtered = 0
        self._given_up_news: list[int] = []
        self._tries: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._evals = EvalLeases(lease_timeout_s, run_epoch, 0)

    # -- what stands -----------------------------------------------------------------------------------------

    @property
    def num_trained(self) -> int:
        """Groups trained, those of the batch in training included."""
        return len(self._settled) - self.num_given_up - self.num_filtered

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
        """Prompts whose group had equal rewards and was left out."""
        return self._num_filtered

    @property
    def running_by_version(self) -> Mapping[int, int]:
        """How many running training leases were issued at each version."""
        return self._running_by_version

    def running(self) -> list[LeaseRecord]:
        """Running training leases, oldest grant first."""
        return list(self._running.values())

    def in_range(self, ordinal: int) -> bool:
        """Ordinals the run can need: one for each group it trains on, one more for each given up or filtered."""
        return 0 <= ordinal < self._pacing.total_groups + self.num_given_up + self.num_filtered

    def next_deadline(self, now: float) -> float:
        """When `expire` has something to do or a back-off ends; infinity when never."""
        first = next(iter(self._running.values()), None)
        backoffs = (time for time in self._waiting.values() if time > now)
        lease_deadline = first.deadline_at if first is not None else float("inf")
        return min([lease_deadline, self._evals.next_deadline(), *backoffs])

    # -- a lease's life --------------------------------------------------------------------------------------

    def grant(
        self, holder: str, held_version: int | None, room: int, learner_version: int, now: float
    ) -> list[LeaseRecord]:
        """Up to `room` leases for a generator that proved `held_version` (None: nothing proved, no leases).

        Eval leases come first. Nothing is granted beyond the groups of the last step.
        """
        if held_version is None or room <= 0:
            return []
        issued_version = min(held_version, learner_version)
        leases = self._evals.grant(holder, held_version, room, now)
        ceiling = self._pacing.ceiling(issued_version)
        again = sorted((ordinal for ordinal, time in self._waiting.items() if time <= now), reverse=True)
        while len(leases) < room and self.num_admitted < ceiling:
            if again:
                ordinal = again.pop()
                del self._waiting[ordinal]
            elif self.in_range(self._next_ordinal):
                ordinal = self._next_ordinal
                self._next_ordinal += 1
            else:
                break
            key = LeaseKey(LeaseKind.TRAIN, ordinal, self._first_attempt + self._tries[ordinal])
            self._tries[ordinal] += 1
            leases.append(self._start(key, holder, issued_version, now))
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
            or ordinal in self._accepted
            or ordinal in self._settled
            or self.num_admitted >= self._pacing.ceiling(issued_version)
        ):
            return False
        self._learn_of(ordinal, now)
        del self._waiting[ordinal]
        self._start(key, holder, issued_version, now)
        return True

    def accept(self, key: LeaseKey) -> Acceptance:
        """A valid group came in for `key`. The first of its ordinal wins, even if its lease has expired."""
        if key.kind == LeaseKind.EVAL:
            return self._evals.accept(key)
        if key.ordinal in self._given_up or not self._may_have_been_granted(key):
            return Acceptance(Verdict.UNKNOWN)
        if key.ordinal in self._accepted or key.ordinal in self._settled:
            return Acceptance(Verdict.DUPLICATE)
        self._learn_of(key.ordinal, 0.0)
        running = self._running.get(key.ordinal)
        if running is not None:
            self._stop(running)
        self._waiting.pop(key.ordinal, None)
        self._accepted[key.ordinal] = key.attempt
        return Acceptance(Verdict.ACCEPTED, running if running is not None and running.key != key else None)

    def fail(self, key: LeaseKey, reason: str, now: float) -> bool:
        """A lease ended without a group: its ordinal is leased again, or given up when too much failed.

        False when the lease was not running (expired, leased again): the news is late and changes nothing.
        """
        if key.kind == LeaseKind.EVAL:
            return self._evals.fail(key)
        record = self._running.get(key.ordinal)
        if record is None or record.key != key:
            return False
        self._stop(record)
        backoff_s = 0.0
        if blame(reason):
            backoff_s = BACKOFF_S * 2 ** self._failures[key.ordinal]
            self._failures[key.ordinal] += 1
        self._lease_again(key.ordinal, now, backoff_s)
        return True

    def expire(self, now: float) -> list[LeaseRecord]:
        """Fails every lease past its deadline and returns them: their holders should abandon them."""
        expired = []
        for record in self.running():
            if record.deadline_at > now:
                break
            self.fail(record.key, "expired", now)
            expired.append(record)
        return expired + self._evals.expire(now)

    def release(self, holder: str, now: float) -> list[LeaseRecord]:
        """Puts back all leases of a generator that left, died or was fenced."""
        return self._fail_all(self._leases_of(holder), "released", now)

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
        self._lease_again(key.ordinal, now, 0.0)

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

    def take_given_up(self) -> list[int]:
        """Ordinals given up since the last call, for the journal."""
        news, self._given_up_news = self._given_up_news, []
        return news

    # -- evaluation ------------------------------------------------------------------------------------------

    @property
    def evaluation(self) -> EvalProgress | None:
        """The latest evaluation of this run epoch, done or not."""
        return self._evals.current

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
            failures=dict(sorted(self._failures.items())),
        )

    def restore(
        self,
        state: SavedLeases | None,
        trained: Iterable[int],
        accepted: Iterable[LeaseKey],
        given_up: Iterable[int],
        filtered: Iterable[int],
    ) -> None:
        """Continues from a checkpoint's state (None: from nothing) and what the journal adds to it.

        trained   ordinals of the steps that are trained again from the journal
        accepted  groups that go back to the buffer
        given_up  ordinals given up since the checkpoint
        filtered  ordinals filtered since the checkpoint; earlier ones among these change nothing
        What was running is leased again, unless a generator that works on it is heard of first (`adopt`).
        """
        assert self._next_ordinal == 0, "restore comes before the first grant"
        if state is not None:
            self._next_ordinal = state.next_ordinal
            self._evals.next_ordinal = state.next_eval_ordinal
            self._settled = state.settled.copy()
            self._given_up = set(state.given_up)
            self._num_filtered = state.num_filtered
            self._failures.update(state.failures)
        for ordinal in given_up:
            if ordinal not in self._settled:
                self._settle(ordinal)
                self._given_up.add(ordinal)
        for ordinal in filtered:
            if ordinal not in self._settled:
                self._settle(ordinal)
                self._num_filtered += 1
        for ordinal in trained:
            self._settle(ordinal)
        self._accepted = {key.ordinal: key.attempt for key in accepted if key.ordinal not in self._settled}
        known = [self._next_ordinal - 1, self._settled.watermark - 1, *self._settled.above, *self._accepted]
        self._next_ordinal = 1 + max(known)
        unfinished = range(self._settled.watermark, self._next_ordinal)
        self._waiting = {n: 0.0 for n in unfinished if n not in self._settled and n not in self._accepted}

    # -- inside ----------------------------------------------------------------------------------------------

    def _start(self, key: LeaseKey, holder: str, issued_version: int, now: float) -> LeaseRecord:
        record = LeaseRecord(key, holder, issued_version, now, now + self._lease_timeout_s)
        self._running[key.ordinal] = record
        self._running_by_version[issued_version] += 1
        return record

    def _stop(self, record: LeaseRecord) -> None:
        del self._running[record.key.ordinal]
        self._running_by_version[record.issued_version] -= 1
        if not self._running_by_version[record.issued_version]:
            del self._running_by_version[record.issued_version]

    def _lease_again(self, ordinal: int, now: float, backoff_s: float) -> None:
        if self._failures[ordinal] < MAX_BLAMED_FAILURES and self._tries[ordinal] < MAX_ATTEMPTS:
            self._waiting[ordinal] = now + backoff_s
            return
        self._settle(ordinal)
        self._given_up.add(ordinal)
        self._given_up_news.append(ordinal)

    def _settle(self, ordinal: int) -> None:
        self._settled.add(ordinal)
        self._tries.pop(ordinal, None)
        self._failures.pop(ordinal, None)

    def _leases_of(self, holder: str) -> list[LeaseRecord]:
        return [record for record in (*self._running.values(), *self._evals.running()) if record.holder == holder]

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

    def _learn_of(self, ordinal: int, now: float) -> None:
        """An earlier run epoch had leased this ordinal, hence all before it: those not known yet wait to be leased."""
        while self._next_ordinal <= ordinal:
            self._waiting[self._next_ordinal] = now
            self._next_ordinal += 1


assert MAX_ATTEMPTS < ATTEMPTS_PER_EPOCH

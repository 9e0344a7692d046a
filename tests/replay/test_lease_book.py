"""The lease book: every prompt is in exactly one place, and comes out trained once or given up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncrl.replay.lease_book import MAX_ATTEMPTS, LeaseBook
from asyncrl.replay.lease_records import MAX_LONE_FAILURES, MAX_STRIKES, Verdict
from asyncrl.replay.pacing import Pacing
from asyncrl.types import LeaseKey, LeaseKind

FOREVER = float("inf")


def make_book(groups_per_step=2, max_age=1, steps=10, run_epoch=1):
    return LeaseBook(Pacing(groups_per_step, max_age, steps), lease_timeout_s=60.0, run_epoch=run_epoch)


def train_key(ordinal, attempt=0):
    return LeaseKey(LeaseKind.TRAIN, ordinal, attempt)


def keys(leases):
    return [lease.key for lease in leases]


def ordinals(leases):
    return [lease.key.ordinal for lease in leases]


# -- admission --------------------------------------------------------------------------------------------------


def test_leases_are_granted_in_order_up_to_room_and_up_to_the_ceiling_of_the_held_version():
    book = make_book(groups_per_step=2, max_age=1)
    assert ordinals(book.grant("a", 0, 3, 0, now=0.0)) == [0, 1, 2]
    assert ordinals(book.grant("b", 0, 9, 0, now=0.0)) == [3]
    assert book.grant("b", 0, 9, 0, now=0.0) == []
    assert (book.num_running, dict(book.running_by_version)) == (4, {0: 4})


def test_a_generator_without_a_proven_version_gets_nothing():
    assert make_book().grant("a", None, 9, 0, now=0.0) == []


def test_a_generator_that_missed_a_sync_is_paced_by_the_version_it_holds():
    book = make_book(groups_per_step=1, max_age=1)
    for ordinal in ordinals(book.grant("a", 0, 9, 0, now=0.0)):
        book.accept(train_key(ordinal))
    book.train([train_key(0)])
    assert book.grant("late", 0, 9, 1, now=1.0) == []
    [lease] = book.grant("fresh", 1, 9, 1, now=1.0)
    assert (lease.key.ordinal, lease.issued_version) == (2, 1)


def test_nothing_is_leased_beyond_the_last_step():
    book = make_book(groups_per_step=2, max_age=9, steps=3)
    assert ordinals(book.grant("a", 0, 99, 0, now=0.0)) == [0, 1, 2, 3, 4, 5]
    assert book.grant("a", 0, 99, 0, now=0.0) == []


# -- failures ---------------------------------------------------------------------------------------------------


def test_a_failed_prompt_is_leased_again_before_new_ones_as_the_next_attempt():
    book = make_book(groups_per_step=4, max_age=0)
    book.grant("a", 0, 3, 0, now=0.0)
    assert book.fail(train_key(2), "returned", now=1.0)
    assert book.fail(train_key(0), "returned", now=1.0)
    assert keys(book.grant("b", 0, 9, 0, now=1.0)) == [train_key(0, 1), train_key(2, 1), train_key(3)]


def test_a_failure_that_may_be_the_prompts_own_waits_and_the_third_strike_gives_it_up_for_a_new_prompt():
    """Each failure follows a success of its generator, so that the prompt is to blame."""
    book = make_book(groups_per_step=4, max_age=0, steps=1)
    for attempt, wait in enumerate((1.0, 2.0, None)):
        now = 100.0 * attempt
        assert keys(book.grant("a", 0, 1, 0, now)) == [train_key(0, attempt)]
        other = book.grant("a", 0, 1, 0, now)[0].key
        book.accept(other, "a", now)
        book.fail(train_key(0, attempt), "reward_error", now)
        if wait is not None:
            assert book.next_deadline(now) == now + wait
            assert train_key(0, attempt + 1) not in keys(book.grant("b", 0, 1, 0, now + wait - 0.1))
            book.release("b", now)
    assert (book.take_given_up(), book.take_given_up()) == ([0], [])
    assert book.num_given_up == 1 and book.in_range(4) and not book.in_range(5)


def test_a_prompt_that_fails_at_one_generator_with_nothing_else_to_try_is_given_up_in_the_end():
    """The last prompt of a run: nothing else can be leased between its failures."""
    book = make_book(groups_per_step=1, max_age=1, steps=2)
    book.grant("a", 1, 2, 1, now=0.0)
    book.accept(train_key(0), "a", 0.0)
    now = 0.0
    for attempt in range(MAX_LONE_FAILURES):
        assert book.take_given_up() == []
        if attempt:
            now = book.next_deadline(now)
            assert keys(book.grant("a", 1, 1, 1, now)) == [train_key(1, attempt)]
        book.fail(train_key(1, attempt), "engine", now)
    assert book.take_given_up() == [1]
    assert now <= 80.0


def test_failures_of_the_generator_are_not_held_against_the_prompt_but_do_not_repeat_for_ever():
    book = make_book(groups_per_step=1, max_age=0, steps=1)
    for attempt in range(MAX_ATTEMPTS):
        assert book.take_given_up() == []
        assert keys(book.grant("a", 0, 1, 0, now=0.0)) == [train_key(0, attempt)]
        book.release("a", now=0.0)
    assert book.take_given_up() == [0]


def test_leases_expire_at_their_deadline_and_not_before():
    book = make_book(groups_per_step=3, max_age=0)
    book.grant("a", 0, 1, 0, now=0.0)
    book.grant("b", 0, 1, 0, now=5.0)
    assert book.next_deadline(6.0) == 60.0
    assert book.expire(59.9) == []
    assert keys(book.expire(60.0)) == [train_key(0)]
    assert [(lease.key, lease.holder) for lease in book.running()] == [(train_key(1), "b")]
    assert book.next_deadline(62.0) == 65.0


def test_a_dead_generators_leases_are_released_and_nobody_elses():
    book = make_book(groups_per_step=4, max_age=0)
    book.grant("a", 0, 2, 0, now=0.0)
    book.grant("b", 0, 2, 0, now=0.0)
    assert ordinals(book.release("a", now=1.0)) == [0, 1]
    assert ordinals(book.running()) == [2, 3]


def test_a_lease_that_a_generator_does_not_list_is_put_back_once_it_must_have_arrived():
    book = make_book(groups_per_step=3, max_age=0)
    book.grant("a", 0, 2, 0, now=0.0)
    assert book.reconcile("a", [train_key(0)], now=5.0) == ([], [])
    lost, unexpected = book.reconcile("a", [train_key(0), train_key(7)], now=5.1)
    assert (keys(lost), unexpected) == ([train_key(1)], [train_key(7)])
    assert keys(book.grant("b", 0, 1, 0, now=5.1)) == [train_key(1, 1)]


# -- results ----------------------------------------------------------------------------------------------------


def test_a_result_is_accepted_once():
    book = make_book()
    book.grant("a", 0, 1, 0, now=0.0)
    assert book.accept(train_key(0)) == (Verdict.ACCEPTED, None)
    assert book.accept(train_key(0)) == (Verdict.DUPLICATE, None)
    book.train([train_key(0)])
    assert book.accept(train_key(0)) == (Verdict.DUPLICATE, None)
    assert not book.fail(train_key(0), "engine", now=1.0)


def test_a_late_result_wins_over_the_attempt_that_replaced_it_which_is_then_needless():
    book = make_book()
    book.grant("slow", 0, 1, 0, now=0.0)
    book.expire(60.0)
    [again] = book.grant("quick", 0, 1, 0, now=70.0)
    assert book.accept(train_key(0, 0)) == (Verdict.ACCEPTED, again)
    assert book.accept(again.key) == (Verdict.DUPLICATE, None)
    assert book.num_running == 0


def test_a_late_result_of_a_prompt_that_waits_is_not_leased_again():
    book = make_book(groups_per_step=1, max_age=1)
    book.grant("slow", 0, 1, 0, now=0.0)
    book.expire(60.0)
    assert book.accept(train_key(0, 0)).verdict == Verdict.ACCEPTED
    assert ordinals(book.grant("b", 0, 9, 0, now=99.0)) == [1]


@pytest.mark.parametrize("key", [train_key(1), train_key(0, 1), train_key(-1), train_key(0, -1), train_key(10**9)])
def test_a_result_that_was_never_leased_is_unknown(key):
    book = make_book()
    book.grant("a", 0, 1, 0, now=0.0)
    assert book.accept(key) == (Verdict.UNKNOWN, None)
    assert book.num_running == 1


def test_a_dropped_group_is_leased_again_before_new_prompts():
    book = make_book(groups_per_step=1, max_age=1)
    book.grant("a", 0, 1, 0, now=0.0)
    book.accept(train_key(0))
    book.drop(train_key(0), now=1.0)
    assert keys(book.grant("a", 0, 9, 0, now=1.0)) == [train_key(0, 1), train_key(1)]


def test_a_filtered_group_is_settled_and_a_new_prompt_takes_its_slot():
    book = make_book(groups_per_step=1, max_age=0, steps=1)
    assert book.grant("a", 0, 9, 0, now=0.0)[0].key == train_key(0)
    assert not book.in_range(1)
    book.accept(train_key(0))
    book.filter(train_key(0))
    assert (book.num_trained, book.num_filtered, book.num_given_up, book.num_admitted) == (0, 1, 0, 0)
    assert book.in_range(1) and not book.in_range(2)
    assert book.accept(train_key(0)) == (Verdict.DUPLICATE, None)
    assert keys(book.grant("a", 0, 9, 0, now=0.0)) == [train_key(1)]
    book.accept(train_key(1))
    book.train([train_key(1)])
    assert (book.num_trained, book.num_filtered) == (1, 1)
    assert book.grant("a", 1, 9, 1, now=0.0) == []


# -- restart ----------------------------------------------------------------------------------------------------


def restored(book, run_epoch=2, trained=(), accepted=(), given_up=(), filtered=()):
    fresh = make_book(run_epoch=run_epoch)
    fresh.restore(book.state(), trained, accepted, given_up, filtered)
    return fresh


def test_after_a_restart_what_was_running_is_leased_again_under_keys_never_used_before():
    book = make_book(groups_per_step=2, max_age=1)
    book.grant("a", 0, 4, 0, now=0.0)
    for ordinal in (0, 2, 3):
        book.accept(train_key(ordinal))
    book.train([train_key(0), train_key(2)])
    fresh = restored(book, accepted=[train_key(3)])
    assert fresh.num_trained == 2 and fresh.num_admitted == 3
    assert keys(fresh.grant("a", 1, 2, 1, now=0.0)) == [train_key(1, 1000), train_key(4, 1000)]


def test_grants_made_after_the_checkpoint_are_learnt_from_the_journal():
    book = make_book(groups_per_step=2, max_age=1)
    fresh = restored(book, trained=[0, 2], accepted=[train_key(4)], given_up=[1])
    assert (fresh.num_trained, fresh.num_given_up, fresh.num_admitted) == (2, 1, 3)
    assert keys(fresh.grant("a", 1, 2, 1, now=0.0)) == [train_key(3, 1000), train_key(5, 1000)]


def test_what_was_filtered_before_and_after_the_checkpoint_is_neither_leased_nor_counted_as_trained():
    book = make_book(groups_per_step=2, max_age=1)
    book.grant("a", 0, 4, 0, now=0.0)
    for ordinal in (1, 3):
        book.accept(train_key(ordinal))
        book.filter(train_key(ordinal))
    fresh = restored(book, trained=[0, 2], filtered=[1, 3, 5])  # the journal goes back to before the checkpoint
    assert (fresh.num_trained, fresh.num_filtered, fresh.num_admitted) == (2, 3, 2)
    assert keys(fresh.grant("a", 1, 2, 1, now=0.0)) == [train_key(4, 1000), train_key(6, 1000)]


def test_a_generator_that_outlived_the_learner_goes_on_with_its_leases():
    fresh = restored(make_book(groups_per_step=2, max_age=1))
    assert fresh.adopt("a", train_key(1), issued_version=0, now=3.0)
    assert not fresh.adopt("b", train_key(1), issued_version=0, now=3.0)
    assert [(lease.key, lease.deadline_at) for lease in fresh.running()] == [(train_key(1), 63.0)]
    assert keys(fresh.grant("b", 0, 9, 0, now=3.0)) == [train_key(n, 1000) for n in (0, 2, 3)]
    assert fresh.accept(train_key(1)) == (Verdict.ACCEPTED, None)


def test_adoption_keeps_to_the_ceiling():
    fresh = restored(make_book(groups_per_step=2, max_age=1), trained=[0, 1], accepted=[train_key(2), train_key(3)])
    assert not fresh.adopt("a", train_key(4), issued_version=0, now=0.0)
    assert fresh.adopt("a", train_key(4), issued_version=1, now=0.0)


def test_only_leases_of_earlier_run_epochs_are_adopted():
    fresh = restored(make_book())
    assert not fresh.adopt("a", train_key(0, 1000), issued_version=0, now=0.0)
    assert not fresh.adopt("a", train_key(10**6), issued_version=0, now=0.0)
    assert not fresh.adopt("a", LeaseKey(LeaseKind.EVAL, 0, 0), issued_version=0, now=0.0)


def test_a_result_of_an_earlier_run_epoch_is_welcome_though_the_checkpoint_did_not_know_its_lease():
    fresh = restored(make_book())
    assert fresh.accept(train_key(2, 5)) == (Verdict.ACCEPTED, None)
    assert ordinals(fresh.grant("a", 0, 9, 0, now=0.0)) == [0, 1, 3]
    assert fresh.accept(train_key(10**6)) == (Verdict.UNKNOWN, None)


# -- evaluation -------------------------------------------------------------------------------------------------


def eval_key(ordinal, attempt=0):
    return LeaseKey(LeaseKind.EVAL, ordinal, attempt)


def test_eval_leases_go_first_and_only_to_generators_that_hold_the_version():
    book = make_book(groups_per_step=4, max_age=1)
    evaluation = book.start_eval(version=1, num_prompts=3, timeout_s=100.0, now=0.0)
    assert {lease.key.kind for lease in book.grant("old", 0, 2, 1, now=0.0)} == {LeaseKind.TRAIN}
    granted = book.grant("new", 1, 4, 1, now=0.0)
    assert keys(granted)[:3] == [eval_key(0), eval_key(1), eval_key(2)]
    assert [lease.pinned_version for lease in granted] == [1, 1, 1, None]
    assert granted[3].key == train_key(2)
    for ordinal in range(3):
        assert not evaluation.done
        assert book.accept(eval_key(ordinal)).verdict == Verdict.ACCEPTED
    assert evaluation.done and evaluation.finished == {0, 1, 2}
    assert book.accept(eval_key(1)).verdict == Verdict.DUPLICATE


def test_eval_leases_do_not_count_for_the_pacing_of_training():
    book = make_book(groups_per_step=1, max_age=0)
    book.start_eval(version=0, num_prompts=5, timeout_s=100.0, now=0.0)
    assert len(book.grant("a", 0, 9, 0, now=0.0)) == 6
    assert book.num_running == 1 and dict(book.running_by_version) == {0: 1}


def test_generators_keep_their_weights_while_the_evaluation_needs_them():
    book = make_book()
    held = {"a": 3, "b": 3, "c": 2}
    assert book.eval_holders(held) == set()
    book.start_eval(version=3, num_prompts=2, timeout_s=100.0, now=0.0)
    assert book.eval_holders(held) == {"a", "b"}
    book.grant("a", 3, 2, 3, now=0.0)
    assert book.eval_holders(held) == {"a"}
    book.fail(eval_key(1), "engine", now=1.0)
    assert book.eval_holders(held) == {"a", "b"}
    book.grant("b", 3, 1, 3, now=1.0)
    assert book.accept(eval_key(0)).verdict == book.accept(eval_key(1, 1)).verdict == Verdict.ACCEPTED
    assert book.eval_holders(held) == set()


def test_an_eval_prompt_is_tried_three_times_and_then_given_up():
    book = make_book()
    evaluation = book.start_eval(version=0, num_prompts=1, timeout_s=1000.0, now=0.0)
    for attempt in range(3):
        assert keys(book.grant("a", 0, 1, 0, now=0.0)) == [eval_key(0, attempt)]
        assert book.release("a", now=0.0)
    assert evaluation.done and evaluation.given_up == {0}
    assert book.accept(eval_key(0)).verdict == Verdict.UNKNOWN


def test_an_evaluation_ends_at_its_deadline_with_what_is_in():
    book = make_book()
    evaluation = book.start_eval(version=0, num_prompts=3, timeout_s=30.0, now=0.0)
    book.grant("a", 0, 2, 0, now=0.0)
    book.accept(eval_key(0))
    assert book.next_deadline(0.0) == 30.0
    assert keys(book.expire(30.0)) == [eval_key(1)]
    assert evaluation.done and (evaluation.finished, evaluation.given_up) == ({0}, {1, 2})
    assert book.next_deadline(30.0) == FOREVER


def test_evaluations_number_their_prompts_on_so_that_keys_never_return():
    book = make_book()
    book.start_eval(version=0, num_prompts=2, timeout_s=1.0, now=0.0)
    with pytest.raises(AssertionError, match="version 0 is still running"):
        book.start_eval(version=1, num_prompts=2, timeout_s=1.0, now=0.5)
    book.expire(1.0)
    second = book.start_eval(version=1, num_prompts=2, timeout_s=9.0, now=1.0)
    assert keys(book.grant("a", 1, 2, 1, now=1.0)) == [eval_key(2), eval_key(3)]
    assert second.prompt_index(3) == 1
    assert book.accept(eval_key(0)).verdict == Verdict.UNKNOWN


# -- against a slow, obvious model ------------------------------------------------------------------------------


PLACES = ("trained", "given_up", "filtered", "accepted", "running")


class BookAgainstModel(RuleBasedStateMachine):
    """The model keeps one word per ordinal and searches; the book keeps counts and indexes."""

    @initialize(groups_per_step=st.integers(1, 3), max_age=st.integers(0, 2), steps=st.integers(1, 5))
    def start(self, groups_per_step, max_age, steps):
        self.pacing = Pacing(groups_per_step, max_age, steps)
        self.book = LeaseBook(self.pacing, lease_timeout_s=10.0)
        self.now, self.version, self.epoch = 0.0, 0, 1
        self.place = []  # per ordinal: waiting | running | accepted | trained | given_up | filtered
        self.lease = {}  # ordinal -> running LeaseRecord
        self.winner = {}  # ordinal -> accepted key
        self.blamed, self.not_before, self.granted = {}, {}, []
        self.strikes = {}  # ordinal -> the generator of each
        self.log = {"a": [], "b": []}  # per generator, its outcomes: (ordinal, whether it ended with a group)

    def put_back(self, ordinal, may_be_its_own, holder=None):
        self.place[ordinal] = "waiting"
        self.not_before[ordinal] = self.now
        if holder is None:
            return
        log = self.log[holder]
        successes = [index for index, (_, ok) in enumerate(log) if ok]
        since = {number for number, _ in log[successes[-1] + 1 if successes else 0 :]}
        log.append((ordinal, False))
        if may_be_its_own:
            self.blamed[ordinal] = self.blamed.get(ordinal, 0) + 1
            self.not_before[ordinal] = self.now + min(2 ** (self.blamed[ordinal] - 1), 16)
            if successes and not since:
                self.strikes.setdefault(ordinal, []).append(holder)
        strikes = self.strikes.get(ordinal, [])
        failures = self.blamed.get(ordinal, 0)
        if (
            len(strikes) >= MAX_STRIKES
            or (len(set(strikes)) > 1 and failures >= MAX_STRIKES)
            or (since <= {ordinal} and failures >= MAX_LONE_FAILURES)
        ):
            self.place[ordinal] = "given_up"

    @rule(holder=st.sampled_from("ab"), room=st.integers(0, 4), lag=st.integers(0, 2))
    def grant(self, holder, room, lag):
        held = max(0, self.version - lag)
        room = self.book.outcomes.room(holder, room, self.now)  # has a test of its own
        leases = self.book.grant(holder, held, room, self.version, self.now)
        expected = []
        while len(expected) < room:
            under_way = sum(place in ("running", "accepted", "trained") for place in self.place)
            if under_way >= self.pacing.groups_per_step * min(held + self.pacing.max_age + 1, self.pacing.steps):
                break
            ready = [n for n, p in enumerate(self.place) if p == "waiting" and self.not_before[n] <= self.now]
            replaced = self.place.count("given_up") + self.place.count("filtered")
            if not ready and len(self.place) - replaced >= self.pacing.total_groups:
                break
            ordinal = ready[0] if ready else len(self.place)
            if not ready:
                self.place.append("running")
            self.place[ordinal] = "running"
            expected.append(ordinal)
        assert ordinals(leases) == expected
        for lease in leases:
            assert lease.key not in self.granted and lease.issued_version == held
            self.granted.append(lease.key)
            self.lease[lease.key.ordinal] = lease

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def deliver(self, data):
        key = data.draw(st.sampled_from(self.granted))
        by = data.draw(st.sampled_from("ab"))
        verdict, superseded = self.book.accept(key, by, self.now)
        if verdict is not Verdict.UNKNOWN:
            self.log[by].append((key.ordinal, True))
        place = self.place[key.ordinal]
        if place in ("running", "waiting"):
            assert verdict == Verdict.ACCEPTED
            running = self.lease.pop(key.ordinal) if place == "running" else None
            assert superseded == (running if running is not None and running.key != key else None)
            self.place[key.ordinal], self.winner[key.ordinal] = "accepted", key
        else:
            assert verdict == (Verdict.UNKNOWN if place == "given_up" else Verdict.DUPLICATE)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), reason=st.sampled_from(["returned", "engine", "reward_timeout"]))
    def fail(self, data, reason):
        key = data.draw(st.sampled_from(self.granted))
        was_running = key.ordinal in self.lease and self.lease[key.ordinal].key == key
        assert self.book.fail(key, reason, self.now) == was_running
        if was_running:
            self.put_back(key.ordinal, reason != "returned", self.lease.pop(key.ordinal).holder)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds
        expected = sorted(n for n, lease in self.lease.items() if lease.deadline_at <= self.now)
        expired = ordinals(self.book.expire(self.now))
        assert sorted(expired) == expected
        for ordinal in expired:
            self.put_back(ordinal, True, self.lease.pop(ordinal).holder)

    @rule(holder=st.sampled_from("ab"))
    def generator_dies(self, holder):
        expected = sorted(n for n, lease in self.lease.items() if lease.holder == holder)
        assert sorted(ordinals(self.book.release(holder, self.now))) == expected
        for ordinal in expected:
            del self.lease[ordinal]
            self.put_back(ordinal, False)

    @rule(data=st.data())
    def train_a_batch(self, data):
        ready = [n for n, place in enumerate(self.place) if place == "accepted"]
        if len(ready) >= self.pacing.groups_per_step and self.version < self.pacing.steps:
            batch = data.draw(st.permutations(ready))[: self.pacing.groups_per_step]
            self.book.train(self.winner[ordinal] for ordinal in batch)
            for ordinal in batch:
                self.place[ordinal] = "trained"
            self.version += 1

    @rule(data=st.data())
    def drop_a_group(self, data):
        ready = [n for n, place in enumerate(self.place) if place == "accepted"]
        if ready:
            ordinal = data.draw(st.sampled_from(ready))
            self.book.drop(self.winner.pop(ordinal), self.now)
            self.put_back(ordinal, False)

    @rule(data=st.data())
    def filter_a_group(self, data):
        ready = [n for n, place in enumerate(self.place) if place == "accepted"]
        if ready:
            ordinal = data.draw(st.sampled_from(ready))
            self.book.filter(self.winner.pop(ordinal))
            self.place[ordinal] = "filtered"

    @rule()
    def restart(self):
        state = self.book.state()
        self.epoch += 1
        self.book = LeaseBook(self.pacing, lease_timeout_s=10.0, run_epoch=self.epoch)
        accepted = [self.winner[n] for n, place in enumerate(self.place) if place == "accepted"]
        self.book.restore(state, [], accepted, [], [])
        for ordinal in range(len(self.place)):
            if self.place[ordinal] in ("running", "waiting"):
                self.place[ordinal] = "waiting"
                self.not_before[ordinal] = 0.0
        self.lease.clear()
        self.blamed.clear()
        self.strikes = {ordinal: [""] * len(holders) for ordinal, holders in self.strikes.items()}
        self.log = {"a": [], "b": []}

    @invariant()
    def the_counts_agree(self):
        counted = {place: self.place.count(place) for place in PLACES}
        assert self.book.num_trained == counted["trained"]
        assert self.book.num_given_up == counted["given_up"]
        assert self.book.num_filtered == counted["filtered"]
        assert self.book.num_running == counted["running"] == len(self.lease)
        assert self.book.num_admitted == counted["trained"] + counted["accepted"] + counted["running"]
        by_version = {}
        for lease in self.lease.values():
            by_version[lease.issued_version] = by_version.get(lease.issued_version, 0) + 1
        assert dict(self.book.running_by_version) == by_version
        deadlines = [lease.deadline_at for lease in self.lease.values()]
        deadlines += [
            self.not_before[n]
            for n, place in enumerate(self.place)
            if place == "waiting" and self.not_before[n] > self.now
        ]
        deadlines.append(self.book.outcomes.next_trial(self.now))
        assert self.book.next_deadline(self.now) == min(deadlines)

    @invariant()
    def the_saved_frontier_is_what_was_settled(self):
        settled = self.book.state().settled
        expected = [n for n, place in enumerate(self.place) if place in ("trained", "given_up", "filtered")]
        assert [n for n in range(len(self.place) + 1) if n in settled] == expected


TestBookAgainstModel = BookAgainstModel.TestCase
TestBookAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

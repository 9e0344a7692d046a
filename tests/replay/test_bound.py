"""The bound on policy age: whole runs of lease book, buffer, journal and erratic generators, without clocks.

Guarantees, in every schedule:
1. No trained token is older than max_age.
2. Nothing is dropped, unless expired leases deliver late.
3. Every prompt is trained exactly once or listed as given up or filtered; the run reaches its last step.
4. After a crash of the learner the same batches are trained again in the same order, and what was filtered stays so.
5. Groups with equal rewards are not trained on, up to a bound per batch, beyond which the run goes on with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.filtering import MAX_FILTERED_PER_GROUP, DynamicSampling
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.lease_records import Verdict
from asyncrl.replay.pacing import Pacing
from asyncrl.replay.recovery import replay_plan
from asyncrl.storage.journal_reader import Entry, Location
from asyncrl.storage.records import GroupFiltered, GroupsDropped, PromptGivenUp, StepTaken
from asyncrl.types import Frontier
from tests.replay.replay_making import make_group

LEASE_TIMEOUT_S = 10.0
FAILURES = ("returned", "reward_error", "engine", "tainted")


@dataclass
class Work:
    """A group being sampled; `oldest` is the version of its first token."""

    key: tuple
    issued: int
    oldest: int


class InMemory(list):
    """Stands in for the reader of a journal: records of which all are durable."""

    def __iter__(self):
        return (Entry(Location(0, index), record) for index, record in enumerate(super().__iter__()))

    def read_group(self, location):
        return self[location.offset]


class Run:
    """A learner and its generators. Each method is something that can happen at any time."""

    def __init__(self, pacing, num_generators, rng, late_results, flat_share=0.0):
        self.pacing, self.rng, self.late_results, self.flat_share = pacing, rng, late_results, flat_share
        self.sampling = DynamicSampling(pacing.groups_per_step)
        self.num_filtered = 0  # since the last step
        self.flat_trained = set()
        self.now, self.version, self.epoch = 0.0, 0, 1
        self.leases = LeaseBook(pacing, LEASE_TIMEOUT_S)
        self.buffer = ReplayBuffer(pacing)
        self.log = []
        self.checkpoint = (0, None)
        self.held = {f"g{index}": 0 for index in range(num_generators)}
        self.work = {name: {} for name in self.held}
        self.batches, self.ages, self.num_dropped, self.num_blocked = {}, [], 0, 0

    # What generators do.

    def sync_weights(self, name, version=None):
        held = self.held[name] or 0
        self.held[name] = self.rng.randint(min(held, self.version), self.version) if version is None else version

    def beat(self, name, room):
        unexpected = self.leases.reconcile(name, self.work[name], self.now).unexpected
        for key in unexpected:
            adopted = self.leases.adopt(name, key, self.work[name][key].issued, self.now)
            if not adopted and not self.late_results:
                del self.work[name][key]
        for lease in self.leases.grant(name, self.held[name], room, self.version, self.now):
            oldest = self.rng.randint(lease.issued_version, max(lease.issued_version, self.held[name]))
            self.work[name][lease.key] = Work(lease.key, lease.issued_version, oldest)

    def finish_one(self, name):
        if not self.work[name]:
            return
        key = self.rng.choice(sorted(self.work[name]))
        self.finish(name, key)

    def finish(self, name, key):
        work = self.work[name].pop(key)
        if not self.late_results and all(record.key != key for record in self.leases.running()):
            return
        verdict, superseded = self.leases.accept(key, name, self.now)
        if superseded is not None:
            self.work[superseded.holder].pop(superseded.key, None)
        if verdict != Verdict.ACCEPTED:
            return
        is_flat = self.rng.random() < self.flat_share
        if self.sampling.leaves_out(is_flat):
            self.leases.filter(key)
            self.log.append(GroupFiltered("g", 1, key.ordinal, key.ordinal, key.attempt))
            self.num_filtered += 1
        else:
            if is_flat:
                assert self.num_filtered >= MAX_FILTERED_PER_GROUP * self.pacing.groups_per_step
                self.flat_trained.add(key.ordinal)
            group = make_group(key.ordinal, attempt=key.attempt, version=work.oldest, issued=work.issued)
            self.log.append(group)
            self.buffer.add(group)

    def fail_one(self, name):
        if self.work[name]:
            key = self.rng.choice(sorted(self.work[name]))
            del self.work[name][key]
            self.leases.fail(key, self.rng.choice(FAILURES), self.now)
            self.write_given_up()

    def die(self, name):
        self.work[name].clear()
        self.held[name] = None
        self.leases.release(name, self.now)
        self.write_given_up()

    # What the learner does.

    def pass_time(self, seconds):
        self.now += seconds
        for lease in self.leases.expire(self.now):
            if not self.late_results:
                self.work[lease.holder].pop(lease.key, None)
        self.write_given_up()

    def write_given_up(self):
        self.log.extend(PromptGivenUp(ordinal) for ordinal in self.leases.take_given_up())

    def step(self):
        if self.version == self.pacing.steps:
            return
        dropped = self.buffer.drop_over_age(self.version)
        self.num_dropped += len(dropped)
        if dropped:
            self.log.append(GroupsDropped(tuple((group.ordinal, group.attempt) for group in dropped)))
        for group in dropped:
            self.leases.drop(group.key, self.now)
        self.write_given_up()
        if not self.buffer.can_take(self.version, self.leases.running_by_version):
            self.num_blocked += len(self.buffer) >= self.pacing.groups_per_step
            assert self.buffer.waiting_for(self.version, self.leases.running())
            return
        batch = self.buffer.take(self.version)
        self.leases.train(group.key for group in batch)
        self.sampling.batch_taken()
        self.num_filtered = 0
        self.log.append(StepTaken(self.version, tuple((group.ordinal, group.attempt) for group in batch)))
        self.batches[self.version] = [(group.ordinal, group.attempt) for group in batch]
        self.ages.extend(self.version - group.oldest_version for group in batch)
        self.version += 1

    def save(self):
        self.checkpoint = (self.version, self.leases.state())

    def crash_and_resume(self):
        version, state = self.checkpoint
        settled = state.settled if state else Frontier()
        plan = replay_plan(version, settled, InMemory(self.log))
        assert plan.broken_at is None and version + len(plan.steps) == self.version
        for step in plan.steps:
            assert list(step.groups) == self.batches[step.version]
            read_back = [self.log[place.offset] for place in step.places]
            assert [(group.ordinal, group.attempt) for group in read_back] == self.batches[step.version]
        self.epoch += 1
        accepted = [group.key for group in plan.buffered]
        filtered_before = self.leases.num_filtered
        self.leases = LeaseBook(self.pacing, LEASE_TIMEOUT_S, run_epoch=self.epoch)
        self.leases.restore(state, plan.trained, accepted, plan.given_up, plan.filtered)
        assert self.leases.num_filtered == filtered_before
        self.sampling, self.num_filtered = DynamicSampling(self.pacing.groups_per_step), 0
        self.buffer = ReplayBuffer(self.pacing)
        for group in plan.buffered:
            self.buffer.add(group)
        self.held = dict.fromkeys(self.held)

    # Schedules.

    def happen(self, num_events):
        for _ in range(num_events):
            name = self.rng.choice(list(self.held))
            event = self.rng.random()
            if event < 0.30:
                self.finish_one(name)
            elif event < 0.50:
                self.beat(name, self.rng.randint(1, 2 * self.pacing.groups_per_step))
            elif event < 0.75:
                self.step()
            elif event < 0.87:
                self.sync_weights(name)
            elif event < 0.91:
                self.fail_one(name)
            elif event < 0.94:
                self.pass_time(self.rng.random() * LEASE_TIMEOUT_S / 2)
            elif event < 0.96:
                self.die(name)
            elif event < 0.98:
                self.save()
            else:
                self.crash_and_resume()

    def finish_run(self):
        """From any state, generators that do their work bring the run to its end, without a deadline passing."""
        for _ in range(20 * self.pacing.steps + 100):
            if self.version == self.pacing.steps:
                return
            for name in self.held:
                self.sync_weights(name, self.version)
                self.beat(name, 2 * self.pacing.groups_per_step)
                for key in sorted(self.work[name]):
                    if key in self.work[name]:
                        self.finish(name, key)
            self.step()
            self.pass_time(1.0)
        pytest.fail(f"stuck: {self.buffer.waiting_for(self.version, self.leases.running())}")


def make_run(seed, groups_per_step, max_age, late_results, pacing_class=Pacing, flat_share=0.0):
    rng = random.Random(seed)
    pacing = pacing_class(groups_per_step, max_age, steps=rng.randint(1, 12))
    run = Run(pacing, rng.randint(1, 4), rng, late_results, flat_share)
    run.happen(rng.randint(0, 400))
    run.finish_run()
    return run


def check_every_prompt_once(run):
    trained = [ordinal for version in sorted(run.batches) for ordinal, _ in run.batches[version]]
    given_up = [record.ordinal for record in run.log if isinstance(record, PromptGivenUp)]
    filtered = [record.ordinal for record in run.log if isinstance(record, GroupFiltered)]
    assert len(trained) == run.pacing.total_groups
    assert sorted(trained + given_up + filtered) == list(range(len(trained) + len(given_up) + len(filtered)))
    assert (run.leases.num_given_up, run.leases.num_filtered) == (len(given_up), len(filtered))
    return trained, filtered


def filtered_in(run):
    return {record.ordinal for record in run.log if isinstance(record, GroupFiltered)}


schedules = settings(max_examples=250, deadline=None)
numbers = {"seed": st.integers(0, 2**32), "groups_per_step": st.integers(1, 4), "max_age": st.integers(0, 4)}


@schedules
@given(**numbers)
def test_no_trained_token_is_over_age_and_nothing_is_dropped(seed, groups_per_step, max_age):
    run = make_run(seed, groups_per_step, max_age, late_results=False)
    assert max(run.ages) <= max_age
    assert run.num_dropped == 0
    check_every_prompt_once(run)


@schedules
@given(**numbers, late_results=st.booleans(), flat_share=st.sampled_from([0.2, 0.5, 0.9]))
def test_the_bound_holds_while_groups_with_equal_rewards_are_replaced(
    seed, groups_per_step, max_age, late_results, flat_share
):
    run = make_run(seed, groups_per_step, max_age, late_results, flat_share=flat_share)
    assert max(run.ages) <= max_age
    assert late_results or run.num_dropped == 0
    trained, filtered = check_every_prompt_once(run)
    assert run.flat_trained.isdisjoint(filtered)
    assert flat_share > 0.3 or run.flat_trained.isdisjoint(trained)


@settings(max_examples=50, deadline=None)
@given(**numbers)
def test_a_task_where_all_rewards_are_equal_is_trained_on_after_a_bounded_number_of_groups(
    seed, groups_per_step, max_age
):
    run = make_run(seed, groups_per_step, max_age, late_results=False, flat_share=1.0)
    assert max(run.ages) <= max_age
    assert run.num_dropped == 0
    trained, filtered = check_every_prompt_once(run)
    assert set(trained) == run.flat_trained
    # Counts begin anew at each start of the learner.
    assert len(filtered) <= MAX_FILTERED_PER_GROUP * groups_per_step * (run.pacing.steps + run.epoch - 1)


@schedules
@given(**numbers)
def test_late_results_are_used_once_or_dropped_but_never_trained_over_age(seed, groups_per_step, max_age):
    run = make_run(seed, groups_per_step, max_age, late_results=True)
    assert max(run.ages) <= max_age
    check_every_prompt_once(run)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), groups_per_step=st.integers(1, 5), flat_share=st.sampled_from([0.0, 0.4]))
def test_max_age_0_trains_prompts_in_order_as_a_synchronous_loop_does(seed, groups_per_step, flat_share):
    rng = random.Random(seed)
    run = Run(Pacing(groups_per_step, 0, steps=6), 3, rng, late_results=False, flat_share=flat_share)
    while run.version < 6:
        name = rng.choice(list(run.held))
        event = rng.randrange(3)
        if event == 0:
            run.finish_one(name)
        elif event == 1:
            run.beat(name, 2)
        else:
            run.step()
        if rng.random() < 0.2:
            run.sync_weights(name, run.version)
    in_order = [ordinal for version in range(6) for ordinal, _ in run.batches[version]]
    assert in_order == [ordinal for ordinal in range(in_order[-1] + 1) if ordinal not in filtered_in(run)]
    assert len(in_order) == 6 * groups_per_step
    assert set(run.ages) == {0}


class WaitsForTheNextStepOnly(Pacing):
    """Waits only for leases that would be over-age one step later."""

    def straggling_version(self, version, newest_taken, running_by_version):
        oldest = min(running_by_version, default=version + 1)
        return oldest if oldest <= version - self.max_age and self.max_age > 0 else None


class WaitsForNobody(Pacing):
    def straggling_version(self, version, newest_taken, running_by_version):
        return None


class AdmitsOneMore(Pacing):
    def ceiling(self, held_version):
        return min(Pacing.ceiling(self, held_version) + 1, self.total_groups)


class PacesByNothing(Pacing):
    def ceiling(self, held_version):
        return self.total_groups


@pytest.mark.parametrize("weaker", [WaitsForTheNextStepOnly, WaitsForNobody, AdmitsOneMore, PacesByNothing])
def test_every_weaker_rule_drops_groups_so_the_simulation_can_fail(weaker):
    runs = (make_run(seed, 1 + seed % 3, seed % 4, False, weaker) for seed in range(300))
    assert any(run.num_dropped for run in runs)


def test_the_learner_does_wait_for_stragglers_in_these_schedules():
    assert sum(make_run(seed, 2, 2, False).num_blocked for seed in range(40)) > 0

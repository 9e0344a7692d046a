"""One lease from its prompt to its group, or to the reason why there is none."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from asyncrl.errors import EngineError, NonFiniteError
from asyncrl.generator.lease_runner import LeaseFailure, LeaseRunner
from asyncrl.generator.weight_phases import WeightSync
from asyncrl.link.messages import SyncAbort, SyncCommit, SyncOffer, SyncSwap
from asyncrl.link.weight_records import ChannelPlace
from asyncrl.link.wire_types import FailureReason
from asyncrl.rewards.pool import RewardOutcome
from asyncrl.types import Group, Lease, LeaseKey, LeaseKind
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.generator.fake_engine import FakeEngine, completion, dead

GOOD = RewardOutcome({"exact": 1.0, "format": 0.5})
HUNG = RewardOutcome(None, "reward_timeout", "no reward within 1 s")


class Rewards:
    """Outcomes in turn."""

    def __init__(self, *outcomes):
        self.outcomes = outcomes
        self.scored = []

    async def score(self, completions, payload, prompt, num_tokens):
        self.scored.append((completions, payload))
        self.seen = prompt, num_tokens
        return list(self.outcomes) or [GOOD] * len(completions)


class Proofs:
    """Stands for the weight sync: which versions are proven."""

    num_loads = 3

    def __init__(self, error=None):
        self.asked = []
        self.error = error

    async def wait_proven(self, versions, timeout_s, *, since):
        self.asked.append(set(versions))
        if self.error:
            raise self.error


def lease(kind=LeaseKind.TRAIN, num_rollouts=4, deadline_s=30.0, **changes):
    values = {
        "key": LeaseKey(kind, 3, 1),
        "issued_version": 0,
        "deadline_s": deadline_s,
        "prompt_token_ids": np.array([5, 6], dtype=np.int32),
        "payload": {"answer": "7"},
        "num_rollouts": num_rollouts,
        "max_new_tokens": 8,
        "temperature": 0.7,
    }
    return Lease(**values | changes)


def run(a_lease, engine=None, rewards=None, proofs=None):
    runner = LeaseRunner(engine or FakeEngine(), rewards or Rewards(), proofs or Proofs(), commit_timeout_s=5.0)
    return asyncio.run(runner.run(a_lease)), runner


def test_a_group_has_the_lease_key_the_prompt_and_every_scored_rollout():
    rewards = Rewards()
    group, runner = run(lease(), rewards=rewards)
    assert isinstance(group, Group)
    assert group.key == LeaseKey(LeaseKind.TRAIN, 3, 1)
    assert group.prompt_token_ids.tolist() == [5, 6]
    assert [(rollout.reward, rollout.reward_parts) for rollout in group.rollouts] == [(1.5, GOOD.parts)] * 4
    assert rewards.scored == [(["ok"] * 4, {"answer": "7"})]
    assert (runner.rollouts_completed, runner.rewards_failed) == (4, 0)


def test_the_engine_is_asked_for_what_the_lease_says():
    engine = FakeEngine()
    run(lease(seed=100), engine)
    (request,) = engine.requests
    assert (request.prompt_token_ids, request.num_rollouts, request.max_new_tokens) == ([5, 6], 4, 8)
    assert (request.temperature, request.seeds) == (0.7, (100, 101, 102, 103))
    assert request.request_id == "train-3-1"


def test_without_a_seed_the_engine_draws_freely():
    engine = FakeEngine()
    run(lease(), engine)
    assert engine.requests[0].seeds is None


def test_a_failed_reward_costs_its_rollout_and_nothing_else():
    group, runner = run(lease(), rewards=Rewards(GOOD, HUNG, GOOD, GOOD))
    assert len(group.rollouts) == 3
    assert runner.rewards_failed == 1


@pytest.mark.parametrize(
    "outcomes", [(GOOD, HUNG, HUNG, HUNG), (HUNG, HUNG, HUNG, HUNG)], ids=["one of four left", "none left"]
)
def test_a_group_that_lost_more_than_half_is_a_failure_with_the_reason(outcomes):
    failure, _ = run(lease(), rewards=Rewards(*outcomes))
    assert isinstance(failure, LeaseFailure)
    assert failure.reason == "reward_timeout"
    assert "of 4 rewards failed: no reward within 1 s" in failure.detail


def test_a_group_of_two_needs_both():
    """One rollout alone has nothing to be compared with."""
    assert isinstance(run(lease(num_rollouts=2), rewards=Rewards(GOOD, HUNG))[0], LeaseFailure)


def test_an_evaluated_prompt_needs_its_one_reward():
    evaluated = lease(LeaseKind.EVAL, num_rollouts=1, temperature=0.0, pinned_version=0)
    assert isinstance(run(evaluated)[0], Group)
    assert run(evaluated, rewards=Rewards(HUNG))[0].reason == "reward_timeout"


def test_tokens_leave_only_after_every_version_they_were_sampled_under_is_proven():
    engine = FakeEngine(lambda request: [completion(spans=((0, 1, 3), (1, 4, 4))), completion(spans=((0, 2, 5),))])
    proofs = Proofs()
    group, _ = run(lease(num_rollouts=2), engine, proofs=proofs)
    assert proofs.asked == [{3, 4, 5}]
    assert group.oldest_version == 3


def test_tokens_of_a_version_that_was_never_proven_are_lost_work():
    failure, runner = run(lease(), proofs=Proofs(EngineError("tokens of versions [2], which were never proven")))
    assert failure.reason == "tainted"
    assert runner.generations_failed == 1


def test_a_group_that_waits_for_rewards_while_its_version_is_found_wrong_and_comes_again_is_lost_work():
    """Through the real weight sync: the second load of version 0 is proven, and the group is of the first."""
    buffer = SnapshotBuffer([("weight", torch.nn.Parameter(torch.ones(4)))], bucket_bytes=1024)
    buffer.snapshot()
    manifest = buffer.manifest(0)

    async def scenario():
        engine, replies = FakeEngine(), []
        sync = WeightSync(engine, replies.append)

        async def load(epoch):
            place = ChannelPlace(epoch, "127.0.0.1", 1, f"run/1/{epoch}", rank=1, world_size=2, backend="gloo")
            for message in (SyncOffer(1, 0, epoch, place, manifest, 5.0), SyncSwap(1, 0, epoch, [], 5.0)):
                replies.clear()
                sync.handle(message)
                while not replies:
                    await asyncio.sleep(0)

        class SlowRewards(Rewards):
            async def score(self, *args):
                sync.handle(SyncAbort(1, 0, 1, "the canary differs", True))
                await load(epoch=2)
                sync.handle(SyncCommit(1, 0, 2))
                await sync.wait_proven({0}, 5.0, since=sync.num_loads)
                return await super().score(*args)

        await load(epoch=1)
        runner = LeaseRunner(engine, SlowRewards(), sync, commit_timeout_s=5.0)
        outcome = await runner.run(lease())
        assert isinstance(outcome, LeaseFailure) and outcome.reason == "tainted", outcome
        assert "from before these were loaded again" in outcome.detail
        again = await LeaseRunner(engine, Rewards(), sync, commit_timeout_s=5.0).run(lease())
        assert isinstance(again, Group)
        await sync.close(5.0)

    asyncio.run(scenario())


def test_an_evaluation_that_crossed_a_weight_swap_is_no_evaluation_of_its_version():
    engine = FakeEngine(lambda request: [completion(spans=((0, 1, 3), (1, 2, 4)))])
    rewards = Rewards()
    failure, _ = run(lease(LeaseKind.EVAL, num_rollouts=1, pinned_version=3), engine, rewards)
    assert failure.reason == "not_pinned"
    assert rewards.scored == []


@pytest.mark.parametrize("error", [dead(), NonFiniteError("log-prob nan")], ids=lambda error: type(error).__name__)
def test_a_failing_engine_is_a_state_and_no_reward(error):
    engine = FakeEngine()
    engine.fail["generate"] = error
    failure, runner = run(lease(), engine)
    assert (failure.reason, failure.detail) == ("engine", str(error))
    assert runner.generations_failed == 1


def test_a_tainted_engine_is_not_held_against_the_prompt():
    engine = FakeEngine()
    engine.tainted, engine.fail["generate"] = True, EngineError("the engine is tainted")
    failure, _ = run(lease(), engine)
    assert failure.reason == "tainted"


def test_a_lease_ends_at_its_deadline_and_takes_its_sequences_along():
    async def scenario():
        engine = FakeEngine()
        engine.held_up = asyncio.Event()
        runner = LeaseRunner(engine, Rewards(), Proofs(), commit_timeout_s=5.0)
        return await runner.run(lease(deadline_s=0.05)), engine.aborted

    failure, aborted = asyncio.run(scenario())
    assert failure.reason == "deadline"
    assert aborted == ["train-3-1"]


def test_an_abandoned_lease_takes_its_sequences_along():
    async def scenario():
        engine = FakeEngine()
        engine.held_up = asyncio.Event()
        runner = LeaseRunner(engine, Rewards(), Proofs(), commit_timeout_s=5.0)
        task = asyncio.create_task(runner.run(lease()))
        while not engine.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return engine.aborted

    assert asyncio.run(scenario()) == ["train-3-1"]


def test_a_sequence_that_ended_leaves_room_before_its_lease_ends():
    async def scenario():
        engine = FakeEngine()
        engine.held_up = asyncio.Event()
        heard = []
        runner = LeaseRunner(
            engine, Rewards(), Proofs(), commit_timeout_s=5.0, on_sequence_end=lambda: heard.append("ended")
        )
        a_lease = lease()
        left = [runner.sequences_left(a_lease)]
        task = asyncio.create_task(runner.run(a_lease))
        while not engine.requests:
            await asyncio.sleep(0)
        for _ in range(3):
            engine.requests[0].on_sequence_end()
        left.append(runner.sequences_left(a_lease))
        engine.held_up.set()
        await task
        engine.requests[0].on_sequence_end()  # of a lease that is over: nobody's room
        return left, heard

    left, heard = asyncio.run(scenario())
    assert left == [4, 1]
    assert heard == ["ended"] * 3


def test_parts_of_the_reward_see_the_prompt_as_text_and_the_number_of_tokens_with_the_end_token():
    async def scenario():
        engine = FakeEngine(lambda request: [completion(spans=((0, length, 3),)) for length in (2, 5)])
        rewards = Rewards()
        runner = LeaseRunner(
            engine, rewards, Proofs(), commit_timeout_s=5.0, prompt_text=lambda ids: "-".join(map(str, ids))
        )
        await runner.run(lease(num_rollouts=2))
        return rewards.seen

    assert asyncio.run(scenario()) == ("5-6", [2, 5])


# -- greedy baseline


def with_baseline(**changes):
    return lease(greedy_baseline=True, **changes)


def greedy_and_sampled(request):
    text, version = ("greedy", 4) if request.temperature == 0.0 else ("ok", 3)
    return [completion(text, ((0, 2, version),)) for _ in range(request.num_rollouts)]


def test_one_greedy_completion_is_sampled_besides_and_scored_as_the_others():
    engine, proofs = FakeEngine(greedy_and_sampled), Proofs()
    low = RewardOutcome({"exact": 0.0, "format": 0.25})
    rewards = Rewards(GOOD, GOOD, GOOD, GOOD, low)
    group, runner = run(with_baseline(seed=100), engine, rewards, proofs)
    sampled, greedy = engine.requests
    assert (sampled.num_rollouts, sampled.temperature, sampled.seeds) == (4, 0.7, (100, 101, 102, 103))
    assert (greedy.num_rollouts, greedy.temperature, greedy.seeds) == (1, 0.0, None)
    assert (greedy.prompt_token_ids, greedy.max_new_tokens) == (sampled.prompt_token_ids, sampled.max_new_tokens)
    assert greedy.request_id != sampled.request_id
    assert rewards.scored == [(["ok"] * 4 + ["greedy"], {"answer": "7"})]
    assert proofs.asked == [{3, 4}]
    assert [rollout.reward for rollout in group.rollouts] == [1.5] * 4
    assert group.baseline_reward == 0.25


def test_without_it_a_group_has_no_baseline():
    engine = FakeEngine()
    group, _ = run(lease(), engine)
    assert group.baseline_reward is None
    assert len(engine.requests) == 1


def test_a_greedy_completion_whose_reward_failed_fails_the_lease_and_is_no_zero():
    failure, runner = run(with_baseline(), rewards=Rewards(GOOD, GOOD, GOOD, GOOD, HUNG))
    assert (failure.reason, runner.rewards_failed) == ("reward_timeout", 1)
    assert "the greedy completion failed: no reward within 1 s" in failure.detail


def test_a_failed_reward_of_a_rollout_leaves_the_baseline_alone():
    group, _ = run(with_baseline(), rewards=Rewards(GOOD, HUNG, GOOD, GOOD, GOOD))
    assert (len(group.rollouts), group.baseline_reward) == (3, 1.5)


def test_when_one_of_the_two_requests_fails_the_other_one_is_not_left_running():
    async def scenario():
        engine = FakeEngine()
        never = asyncio.Event()

        async def generate(request):
            engine.requests.append(request)
            if request.temperature == 0.0:
                raise NonFiniteError("log-prob nan")
            await never.wait()

        engine.generate = generate
        runner = LeaseRunner(engine, Rewards(), Proofs(), commit_timeout_s=5.0)
        return await runner.run(with_baseline()), engine

    failure, engine = asyncio.run(scenario())
    assert failure.reason == "engine"
    assert set(engine.aborted) == {request.request_id for request in engine.requests}


def test_at_the_deadline_the_greedy_completion_is_aborted_too():
    async def scenario():
        engine = FakeEngine()
        engine.held_up = asyncio.Event()
        runner = LeaseRunner(engine, Rewards(), Proofs(), commit_timeout_s=5.0)
        return await runner.run(with_baseline(deadline_s=0.05)), engine

    failure, engine = asyncio.run(scenario())
    assert failure.reason == "deadline"
    assert set(engine.aborted) == {request.request_id for request in engine.requests}
    assert len(engine.aborted) == 2


def test_the_greedy_completion_is_one_of_the_sequences_still_to_be_sampled():
    async def scenario():
        engine = FakeEngine()
        engine.held_up = asyncio.Event()
        runner = LeaseRunner(engine, Rewards(), Proofs(), commit_timeout_s=5.0)
        a_lease = with_baseline()
        left = [runner.sequences_left(a_lease)]
        task = asyncio.create_task(runner.run(a_lease))
        while len(engine.requests) < 2:
            await asyncio.sleep(0)
        for request in engine.requests:
            request.on_sequence_end()
        left.append(runner.sequences_left(a_lease))
        engine.held_up.set()
        await task
        return left

    assert asyncio.run(scenario()) == [5, 3]


def test_every_reason_of_a_failed_reward_is_one_that_the_learner_knows():
    assert {"reward_error", "reward_timeout"} <= {*FailureReason}

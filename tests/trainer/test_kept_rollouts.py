"""What a step says of the rollouts that are kept, against one sequence at a time; and that keeping changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.report.rollouts.choice import Why, choose
from asyncrl.trainer.step import StepRunner
from tests.tolerances import assert_near
from tests.trainer.ranks.cases import CASES, groups_of, runner_of
from tests.trainer.tiny import make_group, make_rollout, policy_of, random_groups

pytestmark = pytest.mark.numeric

KEEP = 7


def scores(runner: StepRunner, groups) -> dict[tuple[int, int], np.ndarray]:
    """Log-probs of each completion under the policy as it is now, by ordinal and place."""
    found = {}
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            ids = [*group.prompt_token_ids.tolist(), *rollout.token_ids.tolist()]
            found[group.key.ordinal, place] = policy_of(runner).score([ids])[0][len(group.prompt_token_ids) - 1 :]
    return found


def groups_with_a_flat_one(case):
    """The last group has equal rewards, and so no pass unless something else asks for one."""
    groups = groups_of(case, 0)
    for rollout in groups[-1].rollouts:
        rollout.reward = 1.0
    return groups


ONE_UPDATE = ("grpo", "float32", "kl_in_reward", "ppo_own_trunk", "ppo_shared_trunk", "m2po", "lora")


@pytest.mark.parametrize("name", ONE_UPDATE)
def test_log_probs_at_the_start_of_the_step_are_those_of_the_policy(name):
    case = CASES[name]
    runner, groups = runner_of(case), groups_with_a_flat_one(case)
    expected = scores(runner, groups)
    kept = runner.step(groups, keep=16).kept
    assert len(kept) == 16
    without = [rollout.ordinal for rollout in kept if rollout.old_logprobs is None]
    flat = [group.key.ordinal for group in groups if len({rollout.reward for rollout in group.rollouts}) == 1]
    assert set(without) == (set(flat) if name in ("grpo", "float32", "m2po") else set())
    for rollout in kept:
        assert rollout.current_logprobs is None, "with one update it is the start"
        if rollout.old_logprobs is not None:
            assert_near(rollout.old_logprobs, expected[rollout.ordinal, rollout.place])


def test_with_several_updates_both_the_start_and_the_last_pass_are_known():
    case = CASES["decoupled"]
    runner, groups = runner_of(case), groups_of(case, 0)
    start = scores(runner, groups)
    kept = [rollout for rollout in runner.step(groups, keep=16).kept if rollout.old_logprobs is not None]
    assert kept
    for rollout in kept:
        assert_near(rollout.old_logprobs, start[rollout.ordinal, rollout.place])
        assert rollout.current_logprobs is not None
        assert np.abs(rollout.current_logprobs - rollout.old_logprobs).max() > 1e-4, "the policy has moved in between"


def test_the_start_stays_out_where_a_step_of_several_updates_does_not_compute_it():
    runner, groups = runner_of(CASES["grpo"]), groups_of(CASES["grpo"], 0)
    runner.config.learner.epochs = 2
    kept = [rollout for rollout in runner.step(groups, keep=16).kept if rollout.current_logprobs is not None]
    assert kept and all(rollout.old_logprobs is None for rollout in kept)


def test_advantages_are_those_of_the_groups_and_with_a_critic_those_of_the_tokens():
    case = CASES["grpo"]
    runner, groups = runner_of(case), groups_with_a_flat_one(case)
    for rollout in runner.step(groups, keep=16).kept:
        rewards = np.array([other.reward for other in groups[rollout.ordinal].rollouts])
        spread = rewards.std(ddof=1) + 1e-6
        assert rollout.advantage == pytest.approx((rollout.rollout.reward - rewards.mean()) / spread, abs=1e-6)
        assert rollout.token_advantages is None
    runner = runner_of(CASES["ppo_own_trunk"])
    kept = [rollout for rollout in runner.step(groups, keep=16).kept if rollout.rollout.num_tokens > 1]
    assert any(rollout.token_advantages is not None for rollout in kept)
    for rollout in kept:
        if rollout.token_advantages is not None:
            assert len(rollout.token_advantages) == rollout.rollout.num_tokens
            assert rollout.advantage == pytest.approx(float(rollout.token_advantages.mean()), abs=1e-6)


def test_the_choice_is_of_the_whole_batch_whatever_the_order_of_its_groups():
    case = CASES["grpo"]
    groups = groups_of(case, 0)
    kept, again = (runner_of(case).step(some, keep=KEEP).kept for some in (groups, groups[::-1]))
    named = [[(rollout.ordinal, rollout.place, rollout.why) for rollout in each] for each in (kept, again)]
    assert named[0] == named[1]
    every = [(group.key.ordinal, place) for group in groups for place in range(len(group.rollouts))]
    rewards = np.array([rollout.reward for group in groups for rollout in group.rollouts])
    best = [rollout.rollout.reward for rollout in kept if rollout.why is Why.BEST]
    assert best == sorted(rewards, reverse=True)[: len(best)]
    assert len(choose(rewards, None, KEEP, (0, 0))) == len(kept) == len({(n, p) for n, p, _ in named[0]} & set(every))


@pytest.mark.parametrize("name", ["grpo", "decoupled", "ppo_shared_trunk"])
def test_keeping_rollouts_changes_no_bit_of_the_step(name):
    case = CASES[name]
    plain, keeping = runner_of(case), runner_of(case)
    for number in range(2):
        first, second = plain.step(groups_of(case, number)), keeping.step(groups_of(case, number), keep=KEEP)
        assert first.metrics == second.metrics
        assert first.kept == [] and len(second.kept) == KEEP
    for ours, theirs in zip(plain.engines.all, keeping.engines.all, strict=True):
        for part in ("policy", "critic"):
            a, b = getattr(ours.state(), part), getattr(theirs.state(), part)
            assert a is None or all(torch.equal(a.weights[key], b.weights[key]) for key in a.weights)


def test_a_batch_of_flat_groups_alone_is_kept_without_passes():
    groups = [make_group(n, [1, 2], [make_rollout([3, 4], reward=1.0) for _ in range(3)]) for n in range(2)]
    kept = runner_of(CASES["grpo"]).step(groups, keep=KEEP).kept
    assert len(kept) == 6
    assert all((rollout.old_logprobs, rollout.advantage) == (None, 0.0) for rollout in kept)


def test_fewer_rollouts_than_asked_for_are_all_kept_once():
    groups = random_groups(1, 3)
    kept = runner_of(CASES["grpo"]).step(groups, keep=KEEP).kept
    assert sorted(rollout.place for rollout in kept) == [0, 1, 2]

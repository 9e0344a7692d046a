"""One optimizer step against a loop that could not be plainer, and its invariances."""

import math
import random

import numpy as np
import pytest
import torch

from asyncrl.config import Config
from asyncrl.errors import NonFiniteError, ProtocolError
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.step import StepRunner, warmed_up_lr
from tests.tolerances import near, slack
from tests.trainer.tiny import make_group, make_rollout, policy_of, random_groups, tiny_policy

pytestmark = pytest.mark.numeric

LOGPROB = 4.0  # about the size of the tiny model's log-probs


def make_trainer(policy=None, *, with_reference=False, reference=None, version=0, temperature=1.0, **settings):
    config = Config()
    config.sampling.temperature = temperature
    config.learner.lr = 1e-2
    for name, value in settings.items():
        section = config.algorithm if hasattr(config.algorithm, name) else config.learner
        assert hasattr(section, name), name
        setattr(section, name, value)
    policy = policy or tiny_policy()
    if with_reference:
        reference = tiny_policy(seed=9).freeze()
    return StepRunner(engines_for(policy, config, reference=reference), config, version=version)


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in policy_of(trainer).trainable_parameters()]


def slow_losses(policy, reference, groups, *, temperature, clip_low, clip_high, cap, kl_coef, entropy_coef):
    """The loss of each token by definition: one sequence at a time, the model's own logits, token by token."""
    terms = []
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1))
        for rollout in group.rollouts:
            advantage = (rollout.reward - mean) / (std + 1e-6)
            prompt = group.prompt_token_ids.tolist()
            tokens = torch.tensor([prompt + rollout.token_ids.tolist()])
            log_p = torch.log_softmax(policy.model(tokens).logits[0] / temperature, -1)
            with torch.no_grad():
                log_q = torch.log_softmax(reference.model(tokens).logits[0] / temperature, -1)
            for t, token in enumerate(rollout.token_ids.tolist()):
                row = len(prompt) + t - 1
                log_ratio = log_p[row, token] - float(rollout.behaviour_logprobs[t])
                ratio = log_ratio.exp()
                if ratio > cap:
                    ratio = ratio / ratio.detach() * cap
                loss = -min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
                d = log_q[row, token] - log_p[row, token]
                entropy = -(log_p[row].exp() * log_p[row]).sum()
                terms.append(loss + kl_coef * (d.exp() - d - 1) - entropy_coef * entropy)
    return terms


def test_loss_and_gradient_equal_the_slow_loop():
    groups = random_groups(3, 4, seed=5)
    trainer = make_trainer(
        with_reference=True, temperature=0.8, kl_coef=0.1, entropy_coef=0.01,
        tis_cap=1.5, clip_low=0.1, clip_high=0.3, grad_clip=1e9,
    )  # fmt: skip
    losses = slow_losses(
        policy_of(trainer), trainer.engines.actor.reference, groups, temperature=0.8,
        clip_low=0.1, clip_high=0.3, cap=1.5, kl_coef=0.1, entropy_coef=0.01,
    )  # fmt: skip
    expected, scale = (sum(terms) / len(terms) for terms in (losses, [abs(loss.item()) for loss in losses]))
    gradients = torch.autograd.grad(expected, policy_of(trainer).trainable_parameters())
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    result = trainer.step(groups)
    assert result.metrics["loss"] == near(expected.item(), scale)
    assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert result.version == trainer.version == 1
    assert 0 < result.metrics["clip_fraction"] < 1
    assert 0 < result.metrics["cap_fraction"] < 1


@pytest.mark.parametrize("budget", [1, 13, 40])
@pytest.mark.parametrize("shared_row_tokens", [0, 40])
def test_any_cut_into_micro_batches_makes_the_same_step(budget, shared_row_tokens):
    groups = random_groups(4, 4, seed=1)
    results, weights = [], []
    for tokens, shared in ((10_000, 0), (budget, shared_row_tokens)):
        trainer = make_trainer(with_reference=True, kl_coef=0.05, micro_batch_tokens=tokens)
        trainer.preparation.planner.shared_row_tokens = shared
        results.append(trainer.step(groups).metrics)
        weights.append(weights_of(trainer))
    whole, parts = results
    assert parts["micro_batches"] > whole["micro_batches"] == 1
    for name in whole.keys() - {"micro_batches", "model_inputs"}:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=slack(1.0)), name
    for whole_weight, parts_weight in zip(*weights, strict=True):
        torch.testing.assert_close(parts_weight, whole_weight, rtol=1e-4, atol=1e-4)


def test_the_sums_over_passes_count_each_pass_of_each_update():
    trainer = make_trainer(micro_batch_tokens=50, epochs=2)
    result = trainer.step(random_groups(6, 4, seed=2))
    times, metrics = result.times, result.metrics
    assert metrics["micro_batches"] > 2
    assert times["passes"] == 2 * metrics["micro_batches"] and times["pass_inputs"] == 2 * metrics["model_inputs"]
    assert times["pass_inputs_squared"] >= times["pass_inputs"] ** 2 / times["passes"]  # Cauchy-Schwarz
    assert times["pass_s"] > 0 and 0 < times["pass_inputs_s"] <= 50 * times["pass_s"]
    again = trainer.step(random_groups(6, 4, seed=2)).times
    assert again["passes"] == times["passes"]  # of that step alone


def test_the_same_batch_in_another_order_gives_the_same_bits():
    groups = random_groups(6, 4, seed=2)
    shuffled = list(groups)
    random.Random(1).shuffle(shuffled)
    assert [g.key for g in shuffled] != [g.key for g in groups]
    runs = []
    for batch in (groups, shuffled, groups):
        trainer = make_trainer(micro_batch_tokens=50)
        metrics = [trainer.step(batch).metrics for _ in range(3)]
        runs.append((metrics, weights_of(trainer)))
    for metrics, weights in runs[1:]:
        assert metrics == runs[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, runs[0][1], strict=True))


def test_on_policy_tokens_have_ratio_one_and_no_gap():
    policy = tiny_policy()
    groups = random_groups(3, 4, policy=policy)
    metrics = make_trainer(policy).step(groups).metrics
    assert metrics["ratio_mean"] == near(1.0, LOGPROB)
    assert metrics["ess_share"] == near(1.0)
    assert metrics["logprob_gap"] < slack(LOGPROB)
    assert metrics["logprob_gap_age0"] < slack(LOGPROB)
    assert metrics["clip_fraction"] == metrics["cap_fraction"] == 0.0
    assert metrics["policy_age_max"] == 0.0


def test_training_makes_rewarded_completions_likelier():
    policy = tiny_policy()
    good, bad = [1, 2, 3], [4, 5, 6]
    trainer = make_trainer(policy, lr=3e-3)
    before = policy.score([[7, *good], [7, *bad]])
    for _ in range(5):
        scores = policy.score([[7, *good], [7, *bad]])
        spans = [(0, 3, trainer.version)]
        trainer.step(
            [make_group(0, [7], [
                make_rollout(good, scores[0], reward=1.0, spans=spans),
                make_rollout(bad, scores[1], reward=0.0, spans=spans),
            ])]
        )  # fmt: skip
    after = policy.score([[7, *good], [7, *bad]])
    assert after[0].sum() > before[0].sum() + 1.0
    assert after[1].sum() < before[1].sum()


def test_metrics_of_the_batch_by_hand():
    rollouts = [
        make_rollout([1, 2], reward=1.0, spans=[(0, 1, 3), (1, 2, 5)]),
        make_rollout([3, 4, 5, 6], reward=0.0, spans=[(0, 4, 5)]),
    ]
    flat = [make_rollout([1], reward=0.5, spans=[(0, 1, 4)])] * 2
    metrics = make_trainer(version=5).step([make_group(0, [1], rollouts), make_group(1, [2], flat)]).metrics
    assert metrics["reward_mean"] == 0.5
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.125))
    assert metrics["completion_tokens_mean"] == 2.0
    assert metrics["tokens_trained"] == 8.0
    assert metrics["policy_age_mean"] == pytest.approx((2 + 0 + 0 + 1 + 1) / 8)
    assert metrics["policy_age_max"] == 2.0
    assert metrics["groups_zero_variance"] == 1.0
    assert metrics["tokens_without_gradient"] == 2.0
    assert metrics["rollouts_trained"] == 4.0


def test_flat_groups_cost_no_forward_pass_but_count_in_the_mean():
    mixed = random_groups(1, 4, seed=3)
    for index, rollout in enumerate(mixed[0].rollouts):
        rollout.reward = float(index % 2)
    flat = make_group(1, [1, 2], [make_rollout([3] * mixed[0].num_tokens, reward=1.0)])
    alone = make_trainer().step(mixed).metrics
    both = make_trainer().step([*mixed, flat]).metrics
    assert both["model_inputs"] == alone["model_inputs"]
    assert both["loss"] == pytest.approx(alone["loss"] / 2)
    assert both["grad_norm"] == pytest.approx(alone["grad_norm"] / 2, rel=1e-5)


def test_skipping_flat_groups_changes_no_weights():
    groups = random_groups(4, 4, seed=6)
    for rollout in groups[1].rollouts:
        rollout.reward = 1.0
    # A KL coefficient too small to matter keeps every token in the forward pass.
    skipping, forwarding = make_trainer(), make_trainer(with_reference=True, kl_coef=1e-30)
    for _ in range(3):
        skipped, forwarded = skipping.step(groups).metrics, forwarding.step(groups).metrics
    assert skipped["tokens_without_gradient"] > forwarded["tokens_without_gradient"] == 0
    for a, b in zip(weights_of(skipping), weights_of(forwarding), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_of_flat_groups_is_still_a_step():
    trainer = make_trainer()
    trainer.step(random_groups(2, 4))
    before = weights_of(trainer)
    result = trainer.step([make_group(0, [1], [make_rollout([2], reward=1.0)] * 4)])
    assert result.version == 2
    assert result.metrics["grad_norm"] == 0.0
    assert "entropy" not in result.metrics  # not measured, so not reported
    # Momentum goes on.
    assert not all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


def failing_cases():
    nan_reward = random_groups(2, 4)
    nan_reward[0].rollouts[0].reward = math.nan
    nan_logprob = random_groups(2, 4)
    nan_logprob[1].rollouts[0].behaviour_logprobs[0] = math.nan
    from_the_future = random_groups(2, 4, version=7)
    flat_and_nan = [make_group(0, [1], [make_rollout([2], [math.nan], reward=1.0)] * 2)]
    return [
        (flat_and_nan, NonFiniteError, "behaviour log-probs"),
        (nan_reward, NonFiniteError, "rewards"),
        (nan_logprob, NonFiniteError, "behaviour log-probs"),
        (from_the_future, ProtocolError, "version 7"),
    ]


@pytest.mark.parametrize(("groups", "error", "message"), failing_cases())
def test_a_batch_that_does_not_fit_moves_nothing(groups, error, message):
    trainer = make_trainer()
    before = weights_of(trainer)
    with pytest.raises(error, match=message):
        trainer.step(groups)
    assert trainer.version == 0
    assert not trainer.engines.actor.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_policy_that_is_not_finite_takes_no_step_and_recovers(poison):
    trainer, clean = make_trainer(), make_trainer()
    groups = random_groups(3, 4)
    trainer.step(groups)
    clean.step(groups)
    norm = policy_of(trainer).model.model.norm.weight
    with torch.no_grad():
        healthy, norm[0] = norm[0].clone(), poison
    with pytest.raises(NonFiniteError, match="log-probs under the policy are NaN or infinite; no update made"):
        trainer.step(groups)
    assert trainer.version == 1
    with torch.no_grad():
        norm[0] = healthy
    assert trainer.step(groups).metrics == clean.step(groups).metrics
    assert all(torch.equal(a, b) for a, b in zip(weights_of(trainer), weights_of(clean), strict=True))


def test_a_gradient_that_overflows_takes_no_step():
    groups = random_groups(2, 4)
    trainer = make_trainer(with_reference=True, kl_coef=3e38)
    before = weights_of(trainer)
    with pytest.raises(NonFiniteError, match="not finite; no update made"):
        trainer.step(groups)
    assert trainer.version == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


def test_the_gradient_is_clipped_to_its_norm():
    groups = random_groups(3, 4)
    trainer = make_trainer(grad_clip=1e-3)
    seen = []
    real = trainer.engines.actor.optimizer.step

    def watched():
        seen.extend(p.grad.clone() for p in policy_of(trainer).trainable_parameters())
        return real()

    trainer.engines.actor.optimizer.step = watched
    metrics = trainer.step(groups).metrics
    norm = math.sqrt(sum(float(g.square().sum()) for g in seen))
    assert metrics["grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_warm_up_rises_to_the_learning_rate_and_stays():
    assert [warmed_up_lr(1.0, 3, version) for version in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmed_up_lr(2.0, 0, 0) == 2.0
    trainer = make_trainer(lr=1.0, lr_warmup_steps=1)
    assert trainer.step(random_groups(1, 4)).metrics["lr"] == 0.5


def test_weight_decay_spares_norms_and_biases():
    trainer = make_trainer(weight_decay=0.5, lr=0.1)
    norm = policy_of(trainer).model.model.norm.weight
    embedding = policy_of(trainer).head_weight
    before = norm.detach().clone(), embedding.detach().clone()
    trainer.step([make_group(0, [1], [make_rollout([2], reward=1.0)] * 2)])  # no gradient: decay alone
    assert torch.equal(norm, before[0])
    torch.testing.assert_close(embedding.detach(), before[1] * (1 - 0.1 * 0.5))


def test_every_metric_is_a_finite_float():
    metrics = make_trainer(with_reference=True, kl_coef=0.1).step(random_groups(3, 4)).metrics
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["kl_reference"] > 0

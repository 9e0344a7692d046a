"""Our functions against the ones published in verl, TRL and AReaL: values, and gradients where both differentiate.

Left out unless ASYNCRL_PEERS names a folder with their packages. Nothing is imported from it: the functions are
read out of their source files, so none of the peers' dependencies are needed. Fetch them next to the environment,
never into it, and run this module:

    pip install --no-deps --target /tmp/peers verl==0.9.1 trl==1.16.0 areal==1.0.4
    ASYNCRL_PEERS=/tmp/peers python -m pytest tests/algorithms/test_peers.py

The functions are trusted code of those packages and run here. A package that is not in the folder skips its tests;
one whose functions have other names fails them: then it is another version.

Tensors are random, float64, in rows [B, T] as the peers have them; ours take the tokens inside the mask. Padding
holds other random numbers, which must not matter. Where the two sides differ on purpose, a test says which does what.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from asyncrl.algorithms import advantages as adv
from asyncrl.algorithms.corrections import (
    effective_sample_share,
    interpolated_proximal_logprobs,
    sequence_truncated_weights,
    truncated_ratios,
)
from asyncrl.algorithms.kl import adapted_kl_coef, kl_estimate
from asyncrl.algorithms.losses import AGGREGATIONS, aggregate_loss
from asyncrl.algorithms.masks import band_mask, opsm_mask, second_moment_mask, sequence_band_mask
from asyncrl.algorithms.policy_losses import cispo_loss, gspo_loss, ppo_clip_loss, reinforce_loss
from asyncrl.algorithms.value_targets import gae, value_loss
from tests.peer_functions import PEERS, Config, areal_functions, trl_functions, verl_functions
from tests.tolerances import slack

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(not PEERS, reason="ASYNCRL_PEERS names no folder with the peers' packages"),
]

ROWS, WIDTH, GROUP_SIZE = 40, 12, 4
EXACT = 1e-10  # relative and absolute, float64
# verl adds 1e-8 to counts, AReaL computes its importance weights in float32.
ROUNDED = slack(1.0, steps=32)


@pytest.fixture
def verl():
    return verl_functions()


@pytest.fixture
def areal():
    return areal_functions()


@pytest.fixture
def trl():
    return trl_functions()


@pytest.fixture
def data():
    """Rows with old and new log-probs whose ratios lie between about 0.01 and 100: all regions of all losses."""
    generator = torch.Generator().manual_seed(7)

    def normal():
        return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)
    mask = torch.arange(WIDTH) < lengths[:, None]
    old = -1.0 - normal().abs()
    return SimpleNamespace(
        mask=mask,
        ones=mask.double(),
        index=torch.arange(ROWS)[:, None].expand(ROWS, WIDTH)[mask],
        groups=torch.arange(ROWS) // GROUP_SIZE,
        old=old,
        logprobs=old + 1.5 * normal(),
        behaviour=old + 0.5 * normal(),
        advantages=normal(),
        row_advantages=normal()[:, :1].expand(ROWS, WIDTH),
        weights=normal().abs() * (normal() > -1.0),
        rewards=normal()[:, 0],
        values=normal(),
        token_rewards=normal(),
    )


def outcome_rewards(data, rewards):
    """[B, T]: the reward of a row at its last token, 0 elsewhere."""
    last = data.mask.sum(1, keepdim=True) - 1
    return torch.zeros(data.mask.shape, dtype=rewards.dtype).scatter(1, last, rewards[:, None])


def agree(ours, theirs, tolerance=EXACT):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)


def value_and_gradient(loss_of_rows, rows):
    """A scalar loss and its gradient towards rows [B, T]."""
    rows = rows.clone().requires_grad_()
    loss = loss_of_rows(rows)
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


def our_loss(data, policy_loss, *arguments, mode="token-mean", **options):
    """Value, gradient towards log-probs [B, T], and is_clipped [N] of one of our policy losses."""
    is_clipped = None

    def loss_of_rows(rows):
        nonlocal is_clipped
        result = policy_loss(rows[data.mask], *arguments, **options)
        is_clipped = result.is_clipped
        return aggregated(data, result.losses, mode)

    return *value_and_gradient(loss_of_rows, data.logprobs), is_clipped


def aggregated(data, losses, mode):
    counts = {"num_tokens": len(data.index), "num_sequences": ROWS, "max_tokens": WIDTH}
    return aggregate_loss(losses, data.index, mode=mode, **counts)


def verl_loss(data, function, mode="token-mean", **options):
    """Value and gradient of a policy loss of verl, and its metrics."""
    weights = options.pop("weights", None)
    advantages = options.pop("advantages", data.advantages)
    config = Config(**{"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0} | options)
    config.global_batch_info = {}
    metrics = {}

    def loss_of_rows(rows):
        loss, found = function(data.old, rows, advantages, data.ones, mode, config, weights)
        metrics.update(found)
        return loss

    return *value_and_gradient(loss_of_rows, data.logprobs), metrics


def areal_loss(data, areal, **options):
    """Value and gradient of AReaL's actor loss: old policy `data.old` as the proximal one, `data.behaviour` sampled."""

    def loss_of_rows(rows):
        options.setdefault("advantages", data.advantages)
        return areal.ppo_actor_loss_fn(rows, data.old, data.behaviour, loss_mask=data.mask, **options)[0]

    return value_and_gradient(loss_of_rows, data.logprobs)


def trl_loss(data, trl, **settings):
    """Value and gradient of `GRPOTrainer._compute_loss`, called on the settings it reads instead of a trainer."""
    inputs = {"prompt_ids": torch.zeros(ROWS, 1), "completion_ids": torch.zeros(ROWS, WIDTH)}
    inputs |= {"prompt_mask": torch.ones(ROWS, 1), "completion_mask": data.ones}
    inputs |= {"old_per_token_logps": data.old, "num_items_in_batch": data.mask.sum(), **settings.pop("inputs", {})}
    inputs.setdefault("advantages", data.advantages)
    trainer = SimpleNamespace(
        args=SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=False),
        get_off_policy_mask=trl.get_off_policy_mask,
        _metrics=defaultdict(lambda: defaultdict(list)),
        top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        use_vllm="importance_sampling_ratio" in inputs,
        vllm_importance_sampling_correction=True,
        max_completion_length=WIDTH,
        **{"importance_sampling_level": "token", "loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28}
        | {"beta": 0.0, "off_policy_mask_threshold": None}
        | settings,
    )

    def loss_of_rows(rows):
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (rows, torch.zeros_like(rows), None)
        return trl._compute_loss(trainer, trainer.model, inputs)

    return value_and_gradient(loss_of_rows, data.logprobs)


# Advantages and the critic


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9)])
def test_gae_is_that_of_verl_before_and_after_whitening(verl, data, gamma, lam):
    theirs, returns = verl.compute_gae_advantage_return(data.token_rewards, data.values, data.ones, gamma, lam)
    advantages, targets = gae(data.token_rewards, data.values, data.mask, gamma=gamma, lam=lam)
    agree(targets[data.mask], returns[data.mask])
    agree(advantages[data.mask], (returns - data.values)[data.mask])
    # verl whitens inside, with sqrt(var + 1e-8) where ours has std + 1e-6.
    agree(adv.whiten(advantages, data.mask)[data.mask], theirs[data.mask], 1e-5)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_grpo_advantages_are_those_of_verl(verl, data, normalize_std):
    rewards = data.rewards.clone()
    rewards[:GROUP_SIZE] = 0.3  # all equal
    rows = outcome_rewards(data, rewards)
    theirs, _ = verl.compute_grpo_outcome_advantage(
        rows, data.ones, data.groups.numpy(), norm_adv_by_std_in_grpo=normalize_std
    )
    ours = adv.group_relative_advantages(rewards, data.groups, ROWS // GROUP_SIZE, normalize_std=normalize_std)
    assert not ours[:GROUP_SIZE].any()
    agree(ours[data.index], theirs[data.mask])


def test_rloo_and_remax_advantages_are_those_of_verl(verl, data):
    rows = outcome_rewards(data, data.rewards)
    theirs, _ = verl.compute_rloo_outcome_advantage(rows, data.ones, data.groups.numpy())
    ours = adv.rloo_advantages(data.rewards, data.groups, ROWS // GROUP_SIZE)
    agree(ours[data.index], theirs[data.mask])
    baselines = data.values[:, 0]
    theirs, _ = verl.compute_remax_outcome_advantage(rows, baselines, data.ones)
    agree(adv.remax_advantages(data.rewards, baselines)[data.index], theirs[data.mask])


def test_a_group_of_one_has_its_bare_reward_in_verl_and_no_gradient_here(verl, data):
    rows, alone = outcome_rewards(data, data.rewards), torch.arange(ROWS)
    grpo, _ = verl.compute_grpo_outcome_advantage(rows, data.ones, alone.numpy())
    rloo, _ = verl.compute_rloo_outcome_advantage(rows, data.ones, alone.numpy())
    agree(grpo[:, 0], data.rewards / (1.0 + 1e-6), ROUNDED)
    agree(rloo[:, 0], data.rewards)
    assert not adv.group_relative_advantages(data.rewards, alone, ROWS).any()
    assert not adv.rloo_advantages(data.rewards, alone, ROWS).any()


def test_reinforce_pp_advantages_are_those_of_verl_where_all_rollouts_are_of_one_length(verl, data):
    # verl whitens tokens, so longer rollouts weigh more; ours whitens rollouts. One token each: the same.
    rows, ones = data.rewards[:, None].clone(), torch.ones(ROWS, 1, dtype=torch.float64)
    theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(rows, ones, Config(gamma=1.0))
    agree(adv.reinforce_pp_advantages(data.rewards), theirs[:, 0], 1e-5)
    theirs, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(rows, ones, data.groups.numpy())
    ours = adv.reinforce_pp_advantages(data.rewards, group_index=data.groups, num_groups=ROWS // GROUP_SIZE)
    agree(ours, theirs[:, 0], 1e-5)


def test_reinforce_pp_advantages_whitened_over_tokens_are_those_of_verl(verl, data):
    rows = outcome_rewards(data, data.rewards)
    theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(rows, data.ones, Config(gamma=1.0))
    agree(adv.whiten(data.rewards[data.index]), theirs[data.mask], 1e-5)
    assert (adv.reinforce_pp_advantages(data.rewards)[data.index] - theirs[data.mask]).abs().max() > 1e-2


def test_the_value_loss_is_that_of_verl(verl, data):
    targets, old = data.token_rewards, data.values
    theirs, their_gradient = value_and_gradient(
        lambda rows: verl.compute_value_loss(rows, targets, old, data.ones, 0.5)[0], data.logprobs
    )
    ours, gradient = value_and_gradient(
        lambda rows: value_loss(rows[data.mask], old[data.mask], targets[data.mask], clip=0.5)[0].mean(), data.logprobs
    )
    agree(ours, theirs)
    agree(gradient, their_gradient)
    _, share = verl.compute_value_loss(data.logprobs, targets, old, data.ones, 0.5)
    _, sums = value_loss(data.logprobs[data.mask], old[data.mask], targets[data.mask], clip=0.5)
    assert 0.0 < float(share) < 1.0
    agree(sums["value_clipped"] / sums["value_tokens"], share.double(), ROUNDED)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_value_loss_is_that_of_areal(areal, data, kind):
    # AReaL takes float32 and fixes the Huber bound at 10.
    values, old, targets = (20 * rows.float() for rows in (data.logprobs, data.values, data.token_rewards))
    theirs, their_gradient = value_and_gradient(
        lambda rows: areal.ppo_critic_loss_fn(rows, old, targets, 5.0, data.mask, kind)[0], values
    )
    options = {"clip": 5.0, "kind": kind, "huber_delta": 10.0}
    ours, gradient = value_and_gradient(
        lambda rows: value_loss(rows[data.mask], old[data.mask], targets[data.mask], **options)[0].mean(), values
    )
    agree(ours, theirs, ROUNDED)
    agree(gradient, their_gradient, ROUNDED)


# KL


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_estimates_are_those_of_verl_and_areal(verl, areal, data, estimator):
    reference = data.logprobs + 0.3 * data.values  # within verl's bound of 10 on k3
    ours, gradient = value_and_gradient(lambda rows: kl_estimate(rows, reference, estimator).sum(), data.logprobs)
    theirs, their_gradient = value_and_gradient(
        lambda rows: verl.kl_penalty_forward(rows, reference, estimator).sum(), data.logprobs
    )
    agree(ours, theirs)
    agree(gradient, their_gradient)
    if estimator != "abs":
        per_token = areal.KLEstimator(estimator)(data.logprobs, reference)
        agree(kl_estimate(data.logprobs, reference, estimator), per_token, ROUNDED)


def test_verl_and_areal_hold_k3_below_10_and_ours_does_not(verl, areal):
    logprobs, reference = torch.tensor([-6.0]), torch.tensor([-1.0])
    assert verl.kl_penalty_forward(logprobs, reference, "k3").item() == 10.0
    assert areal.KLEstimator("k3")(logprobs, reference).item() == 10.0
    assert kl_estimate(logprobs, reference, "k3").item() == pytest.approx(math.exp(5.0) - 6.0)


@pytest.mark.parametrize("kl", [0.0, 0.049, 0.052, 0.5])
def test_the_adapted_kl_coefficient_is_that_of_verl(verl, kl):
    controller = verl.AdaptiveKLController(0.1, 0.05, horizon=1000)
    controller.update(kl, n_steps=64)
    assert adapted_kl_coef(0.1, kl, 0.05, horizon_steps=1000 / 64) == pytest.approx(controller.value, rel=1e-12)


# Aggregation


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregation_is_that_of_verl(verl, data, mode):
    theirs, their_gradient = value_and_gradient(
        lambda rows: verl.agg_loss(rows, data.ones, mode, loss_scale_factor=WIDTH), data.logprobs
    )
    ours, gradient = value_and_gradient(lambda rows: aggregated(data, rows[data.mask], mode), data.logprobs)
    # verl adds 1e-8 to the length of a sequence.
    agree(ours, theirs, ROUNDED if mode == "seq-mean-token-mean" else EXACT)
    agree(gradient, their_gradient, ROUNDED if mode == "seq-mean-token-mean" else EXACT)


# Policy losses


@pytest.mark.parametrize(("low", "high", "dual_clip"), [(0.2, 0.2, 3.0), (0.2, 0.28, None), (0.5, 4.0, 1.5)])
def test_ppo_clip_and_dual_clip_are_those_of_verl(verl, data, low, high, dual_clip):
    # verl's dual clip is always on: a bound that nothing reaches switches it off.
    theirs, their_gradient, metrics = verl_loss(
        data,
        verl.compute_policy_loss_vanilla,
        weights=data.weights,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual_clip or 1e9,
    )
    arguments = data.old[data.mask], data.advantages[data.mask]
    options = {"clip_low": low, "clip_high": high, "dual_clip": dual_clip, "loss_factors": data.weights[data.mask]}
    ours, gradient, is_clipped = our_loss(data, ppo_clip_loss, *arguments, **options)
    agree(ours, theirs)
    agree(gradient, their_gradient)
    assert (metrics["actor/pg_clipfrac_lower"] > 0.0) == (dual_clip is not None)
    share = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    assert is_clipped.double().mean().item() == pytest.approx(share, abs=ROUNDED)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_gspo_with_the_token_gradient_is_that_of_verl(verl, data, mode):
    theirs, their_gradient, metrics = verl_loss(
        data, verl.compute_policy_loss_gspo, mode, weights=data.weights, clip_ratio_low=0.3, clip_ratio_high=0.4
    )
    arguments = data.old[data.mask], data.advantages[data.mask], data.index
    options = {"clip_low": 0.3, "clip_high": 0.4, "loss_factors": data.weights[data.mask], "mode": mode}
    ours, gradient, is_clipped = our_loss(data, gspo_loss, *arguments, gradient="token", **options)
    assert 0.0 < metrics["actor/pg_clipfrac"] < 1.0
    assert is_clipped.double().mean().item() == pytest.approx(metrics["actor/pg_clipfrac"], abs=ROUNDED)
    agree(ours, theirs, ROUNDED)
    agree(gradient, their_gradient, ROUNDED)
    # verl keeps the token's own gradient. Ours can differentiate the sequence's ratio, too: the value stays.
    ours, gradient, _ = our_loss(data, gspo_loss, *arguments, gradient="sequence", **options)
    agree(ours, theirs, ROUNDED)
    assert (gradient - their_gradient).abs().max() > 1e-4


def test_gspo_with_the_sequence_gradient_is_that_of_trl_and_areal(trl, areal, data):
    # AReaL averages the advantages of a sequence and TRL has one: so here, too, all its tokens share one.
    rows = data.row_advantages
    arguments = data.old[data.mask], rows[data.mask], data.index
    options = {"clip_low": 0.3, "clip_high": 0.4, "gradient": "sequence"}
    settings = {"importance_sampling_level": "sequence", "inputs": {"advantages": rows[:, 0]}}
    theirs, their_gradient = trl_loss(data, trl, loss_type="grpo", epsilon_low=0.3, epsilon_high=0.4, **settings)
    ours, gradient, is_clipped = our_loss(data, gspo_loss, *arguments, mode="seq-mean-token-mean", **options)
    assert 0 < is_clipped.sum() < len(is_clipped)
    agree(ours, theirs)
    agree(gradient, their_gradient)
    settings = {"importance_sampling_level": "sequence", "advantages": rows}
    theirs, their_gradient = areal_loss(data, areal, eps_clip=0.3, eps_clip_higher=0.4, **settings)
    ours, gradient, _ = our_loss(data, gspo_loss, *arguments, mode="token-mean", **options)
    agree(ours, theirs)
    agree(gradient, their_gradient)


def test_cispo_with_a_floor_is_that_of_verl_and_without_one_that_of_trl(verl, trl, data):
    arguments = data.old[data.mask], data.advantages[data.mask]
    theirs, their_gradient, metrics = verl_loss(
        data, verl.compute_policy_loss_cispo, clip_ratio_low=0.5, clip_ratio_high=1.0
    )
    ours, gradient, is_clipped = our_loss(data, cispo_loss, *arguments, clip_low=0.5, clip_high=1.0)
    agree(ours, theirs)
    agree(gradient, their_gradient)
    assert is_clipped.double().mean().item() == pytest.approx(metrics["actor/pg_clipfrac"], abs=ROUNDED)
    # TRL's bound is the ratio itself, ours and verl's the distance from 1.
    theirs, their_gradient = trl_loss(data, trl, loss_type="cispo", epsilon_high=5.0)
    ours, gradient, is_clipped = our_loss(data, cispo_loss, *arguments, clip_low=None, clip_high=4.0)
    assert is_clipped.any()
    agree(ours, theirs)
    agree(gradient, their_gradient)


def test_reinforce_with_truncated_weights_is_that_of_verl(verl, data):
    log_ratios = data.logprobs - data.old
    weights, _ = verl.compute_rollout_correction_weights(log_ratios, data.ones, "token", 2.0)
    theirs, their_gradient, _ = verl_loss(data, verl.compute_policy_loss_reinforce, weights=weights)
    arguments = data.old[data.mask], data.advantages[data.mask]
    ours, gradient, is_clipped = our_loss(data, reinforce_loss, *arguments, ratio_cap=2.0)
    assert is_clipped.any()
    agree(ours, theirs)
    agree(gradient, their_gradient)
    theirs, their_gradient, _ = verl_loss(data, verl.compute_policy_loss_reinforce)
    ours, gradient, _ = our_loss(data, reinforce_loss, *arguments, ratio_cap=None, importance=False)
    agree(ours, theirs)
    agree(gradient, their_gradient)


MODES_OF_TRL = [("grpo", "seq-mean-token-mean"), ("dapo", "token-mean"), ("dr_grpo", "seq-mean-token-sum-norm")]


@pytest.mark.parametrize(("loss_type", "mode"), MODES_OF_TRL)
def test_ppo_clip_with_importance_weights_and_opsm_is_the_loss_of_trl(trl, data, loss_type, mode):
    rows = data.row_advantages
    weights = truncated_ratios(data.old - data.behaviour, 3.0)
    inputs = {
        "advantages": rows[:, 0],
        "importance_sampling_ratio": weights,
        "sampling_per_token_logps": data.behaviour,
    }
    theirs, their_gradient = trl_loss(data, trl, loss_type=loss_type, off_policy_mask_threshold=0.3, inputs=inputs)
    log_ratios = (data.logprobs - data.behaviour)[data.mask]
    keep_mask = opsm_mask(log_ratios, data.index, rows[data.mask], 0.3)
    assert 0 < keep_mask.sum() < len(keep_mask)
    options = {"clip_low": 0.2, "clip_high": 0.28, "loss_factors": weights[data.mask] * keep_mask, "mode": mode}
    ours, gradient, _ = our_loss(data, ppo_clip_loss, data.old[data.mask], rows[data.mask], **options)
    agree(ours, theirs)
    agree(gradient, their_gradient)


def test_delta_of_trl_is_our_dual_clip_and_our_cap_in_value_but_not_in_gradient(trl, data):
    theirs, their_gradient = trl_loss(data, trl, delta=2.0)
    arguments = data.old[data.mask], data.advantages[data.mask]
    bounds = {"clip_low": 0.2, "clip_high": 0.28}
    ours, gradient, _ = our_loss(data, ppo_clip_loss, *arguments, dual_clip=2.0, **bounds)
    agree(ours, theirs)
    agree(gradient, their_gradient)
    # The cap truncates: a bad token that became much likelier is still pushed back. TRL lets go of it.
    ours, gradient, _ = our_loss(data, ppo_clip_loss, *arguments, ratio_cap=2.0, **bounds)
    agree(ours, theirs)
    released = (data.advantages < 0) & (data.logprobs - data.old > math.log(2.0)) & data.mask
    assert released.any()
    assert not their_gradient[released].any()
    agree(gradient[released], -2.0 * data.advantages[released] / len(data.index))
    agree(gradient[~released], their_gradient[~released])


def test_the_kl_term_of_trl_is_k3_against_the_reference(trl, data):
    theirs, their_gradient = trl_loss(data, trl, beta=0.1, inputs={"ref_per_token_logps": data.behaviour})
    tokens = data.old[data.mask], data.advantages[data.mask]

    def loss_of_rows(rows):
        losses = ppo_clip_loss(rows[data.mask], *tokens, clip_low=0.2, clip_high=0.28).losses
        return (losses + 0.1 * kl_estimate(rows[data.mask], data.behaviour[data.mask], "k3")).mean()

    ours, gradient = value_and_gradient(loss_of_rows, data.logprobs)
    agree(ours, theirs)
    agree(gradient, their_gradient)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("action", ["clamp", "mask"])
def test_decoupled_ppo_is_that_of_areal(areal, data, action, dual_clip):
    sampling = Config(level="token", action=action, metric="ratio", agg="mean", upper=1.5, lower=None)
    options = {"eps_clip": 0.2, "eps_clip_higher": 0.28, "c_clip": dual_clip, "rejection_sampling": sampling}
    theirs, their_gradient = areal_loss(data, areal, **options)
    log_ratios = (data.old - data.behaviour)[data.mask]
    is_large = ~band_mask(log_ratios, 0.0, 1.5)
    assert is_large.any()
    # Both sides divide by all tokens, the masked ones among them.
    weights = truncated_ratios(log_ratios, 1.5) if action == "clamp" else log_ratios.exp() * ~is_large
    arguments = data.old[data.mask], data.advantages[data.mask]
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual_clip, "loss_factors": weights}
    ours, gradient, _ = our_loss(data, ppo_clip_loss, *arguments, **options)
    agree(ours, theirs, ROUNDED)
    agree(gradient, their_gradient, ROUNDED)


def test_sequence_weights_by_the_geometric_mean_are_those_of_areal(areal, data):
    bounds = {"metric": "ratio", "agg": "mean", "level": "sequence", "upper": 1.1, "lower": 0.9}
    log_ratios = (data.old - data.behaviour)[data.mask]
    cut = areal.apply_rejection_sampling(data.old, data.behaviour, data.mask, None, Config(action="mask", **bounds))
    keep_mask = sequence_band_mask(log_ratios, data.index, 0.9, 1.1)
    assert 0 < keep_mask.sum() < len(keep_mask)
    assert torch.equal(cut.loss_mask[data.mask], keep_mask)
    weights = sequence_truncated_weights(log_ratios, data.index, 1e6, mean=True)
    agree(weights * keep_mask, cut.behave_imp_weight[data.mask].double(), ROUNDED)
    bounds["lower"] = None
    cut = areal.apply_rejection_sampling(data.old, data.behaviour, data.mask, None, Config(action="clamp", **bounds))
    weights = sequence_truncated_weights(log_ratios, data.index, 1.1, mean=True)
    agree(weights, cut.behave_imp_weight[data.mask].double(), ROUNDED)


def test_interpolated_proximal_logprobs_are_those_of_areal(areal, data):
    ages = torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) % 9
    # AReaL counts the version being made (20), ours the one before it, which is the proximal one (19).
    theirs = areal.compute_prox_logp_approximations(data.old, data.logprobs, 19 - ages, 20, "loglinear")["loglinear"]
    # Its interpolation factor is float32.
    agree(interpolated_proximal_logprobs(data.logprobs, data.old, ages), theirs, ROUNDED)


# Weights and masks


@pytest.mark.parametrize("cap", [1.0, 2.0, 5.0])
def test_truncated_importance_weights_are_those_of_verl(verl, data, cap):
    log_ratios = data.logprobs - data.old
    theirs, metrics = verl.compute_rollout_correction_weights(log_ratios, data.ones, "token", cap)
    ours = truncated_ratios((data.logprobs - data.old)[data.mask], cap)
    agree(ours, theirs[data.mask])
    share = effective_sample_share(ours.sum(), ours.square().sum(), ours.numel())
    assert share.item() == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=ROUNDED)
    theirs, _ = verl.compute_rollout_correction_weights(log_ratios, data.ones, "sequence", cap)
    # verl holds the sum of log-ratios above -20, too: a weight of 2e-9 where ours is smaller.
    agree(sequence_truncated_weights(log_ratios[data.mask], data.index, cap), theirs[data.mask], 1e-8)


def test_icepop_weights_are_those_of_verl(verl, data):
    log_ratios = data.logprobs - data.old
    theirs, _ = verl.compute_rollout_correction_weights(log_ratios, data.ones, "token", "0.5_5")
    ours = log_ratios[data.mask].exp() * band_mask(log_ratios[data.mask], 0.5, 5.0)
    agree(ours, theirs[data.mask])
    assert 0 < (ours == 0).sum() < len(ours)


def test_band_masks_are_those_of_verl_with_the_inverse_ratio(verl, data):
    # verl bounds k1 = log(mu / pi): a band [a, b] of it is [1 / b, 1 / a] of pi / mu.
    log_ratios = data.logprobs - data.old
    theirs, _ = verl.compute_rollout_rejection_mask(log_ratios, data.ones, "token_k1", "0.25_3")
    ours = band_mask(log_ratios[data.mask], 1 / 3, 4.0)
    assert torch.equal(ours, theirs[data.mask].bool()) and 0 < ours.sum() < len(ours)
    theirs, _ = verl.compute_rollout_rejection_mask(log_ratios, data.ones, "seq_mean_k1", "0.6_1.5")
    ours = sequence_band_mask(log_ratios[data.mask], data.index, 1 / 1.5, 1 / 0.6)
    assert torch.equal(ours, theirs[data.mask].bool()) and 0 < ours.sum() < len(ours)


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
def test_opsm_is_the_off_policy_mask_of_trl(trl, data, delta):
    rows = data.row_advantages
    theirs = trl.get_off_policy_mask(rows[:, :1], data.logprobs, data.old, data.ones, delta)
    keep_mask = opsm_mask((data.logprobs - data.old)[data.mask], data.index, rows[data.mask], delta)
    assert torch.equal(keep_mask, theirs[:, 0].bool()[data.index]) and 0 < keep_mask.sum() < len(keep_mask)


@pytest.mark.parametrize(("threshold", "share"), [(0.04, "some"), (0.5, "some"), (100.0, "all"), (1e-12, "none")])
def test_m2po_masks_are_those_of_areal(areal, data, threshold, share):
    theirs = areal._apply_m2po_masking(data.old, data.logprobs, data.mask, threshold)[data.mask]
    squares = (data.logprobs - data.old)[data.mask]
    ours = second_moment_mask(squares, threshold)
    assert int(ours.sum()) in {"some": range(1, len(ours)), "all": [len(ours)], "none": [0]}[share]
    if share == "none":
        # No token is within the threshold: AReaL keeps the smallest, ours none.
        assert theirs.sum() == 1 and theirs[squares.abs().argmin()]
    else:
        assert torch.equal(ours, theirs)


# Bounds of the ratio


def test_beyond_e20_verl_and_ours_have_one_value_and_only_ours_a_gradient(verl, data):
    data.logprobs = data.old + 30.0 * torch.where(torch.arange(WIDTH) % 2 == 0, 1.0, -1.0)
    advantages = -data.advantages.abs()
    options = {"clip_ratio_c": 1e30, "advantages": advantages}
    theirs, their_gradient, _ = verl_loss(data, verl.compute_policy_loss_vanilla, **options)
    bounds = {"clip_low": 0.2, "clip_high": 0.2}
    ours, gradient, _ = our_loss(data, ppo_clip_loss, data.old[data.mask], advantages[data.mask], **bounds)
    agree(ours, theirs)
    # verl clamps the log-ratio, ours truncates the ratio: the bad token stays under pressure (see `truncated_ratios`).
    is_large = (data.logprobs > data.old) & data.mask
    assert not their_gradient.any()
    agree(gradient[is_large], -math.exp(20.0) * advantages[is_large] / len(data.index))
    assert not gradient[~is_large].any()


def test_verl_bounds_the_ratio_of_a_sequence_by_e10_and_ours_by_e20(verl, data):
    data.logprobs = data.old + 12.0
    advantages = -torch.ones_like(data.old)
    theirs, _, _ = verl_loss(data, verl.compute_policy_loss_gspo, advantages=advantages)
    arguments = data.old[data.mask], advantages[data.mask], data.index
    ours, _, _ = our_loss(data, gspo_loss, *arguments, clip_low=0.2, clip_high=0.2)
    assert theirs.item() == pytest.approx(math.exp(10.0))
    assert ours.item() == pytest.approx(math.exp(12.0))

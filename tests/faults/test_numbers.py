"""What once came out wrong without a word: losses, KL, rows, rewards and their figures, each with its right value."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.algorithms.kl import kl_estimate
from asyncrl.config import Config
from asyncrl.config.keys import keys
from asyncrl.config.loading import load_config
from asyncrl.config.methods import KL_ESTIMATORS_BY_PLACE, chosen_kl_estimator
from asyncrl.desk.evaluation import EvalResults
from asyncrl.desk.generators import ORDINAL_SEED_STRIDE, RUN_SEED_STRIDE
from asyncrl.errors import ConfigError, ProtocolError, RewardError
from asyncrl.link.codec import decode, encode
from asyncrl.link.rollouts import group_to_result, lease_to_grant, result_to_group, validate_group
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summarize
from asyncrl.rewards.base import Sample
from asyncrl.rewards.parts import RewardParts, check_reward_parts
from asyncrl.rewards.pipe import Scored, decode_scored
from asyncrl.rewards.pipe import encode as encode_scored
from asyncrl.rewards.pool import RewardOutcome, RewardPool
from asyncrl.trainer.batch import MicroBatchData
from asyncrl.trainer.engines.device_rows import RowLayout
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.single import SinglePolicyEngine
from asyncrl.trainer.engines.trunk import has_known_attention
from asyncrl.trainer.objective import ActorObjective
from asyncrl.trainer.packing import pack_groups
from asyncrl.trainer.rank import outcome_metrics
from asyncrl.types import Group, Lease, LeaseKey, LeaseKind, reward_parts_problem, weighted_sum
from tests.trainer.tiny import make_group, make_rollout, random_groups


def config_of(*overrides):
    return load_config(None, ["model.path=unused", *overrides])


# -- expected gradients over a small vocabulary ----------------------------------------------------------------------
#
# One token is sampled from mu, given an advantage by its number, and scored by pi = softmax(logits). The expectation of
# the gradient over all tokens of the vocabulary needs no sampling: every token once, weighted by mu.


def softmaxes(size, seed, distance):
    """log pi (with its logits), log mu, `distance` apart in logits; float64."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        log_mu = torch.log_softmax(logits + distance * torch.randn(size, generator=draw, dtype=torch.float64), 0)
    return logits, torch.log_softmax(logits, 0), log_mu


def token_data(log_mu, advantages, ages, reference=None, start=None):
    """Every token of the vocabulary as a completion of one token."""
    count = torch.arange(len(log_mu))
    return MicroBatchData(
        rows=None,
        rollout_index=count,
        sequence_index=count,
        behaviour_logprobs=log_mu,
        policy_ages=ages,
        advantages=advantages,
        reference_logprobs=reference,
        start_logprobs=start,
    )


def expected_gradient(config, data, logits, logprobs, weights, kl_coef=0.0):
    """Gradient towards the logits of the mean loss, and the sums for the metrics."""
    found = ActorObjective(config).losses(data, logprobs, torch.zeros_like(logprobs), kl_coef)
    (gradient,) = torch.autograd.grad((weights * found.losses).sum(), logits, retain_graph=True)
    return gradient, found.sums


def slow_gradient(logprobs, weights, factors):
    """sum over tokens of weight x factor x d(-log pi)/d logits, by the formula of the softmax."""
    pi = logprobs.detach().exp()
    total = torch.zeros_like(pi)
    for token, (weight, factor) in enumerate(zip(weights.tolist(), factors, strict=True)):
        one_hot = torch.zeros_like(pi)
        one_hot[token] = 1.0
        total -= weight * factor * (one_hot - pi)
    return total


def slow_factor(loss, ratio, advantage, age, *, low, high, cap, dual, schedule):
    """What multiplies -d log pi of one token, and whether a bound of the loss acted on it."""
    cap = 1 + (cap - 1) / (1 + age) if schedule == "cap" else cap
    if schedule == "clip":
        low, high = low / math.sqrt(1 + age), high / math.sqrt(1 + age)
    if loss in ("ppo_clip", "gspo"):
        if (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low):
            return 0.0, True
        if dual and advantage < 0 and ratio > dual:
            return 0.0, True
        return min(ratio, cap) * advantage, False
    if loss == "cispo":
        return min(ratio, 1 + high) * advantage, ratio > 1 + high
    if loss == "topr":
        return (1.0 if advantage > 0 else min(ratio, 1.0)) * advantage, advantage <= 0 and ratio > 1
    return min(ratio, cap) * advantage, ratio > cap


CASES = [
    (loss, schedule, cap, dual)
    for loss in ("ppo_clip", "gspo", "cispo", "topr", "reinforce")
    for schedule in ("none", "cap", "clip")
    for cap in (1.0, 1.1, 2.0)
    for dual in (0.0, 1.2, 3.0)
    if not (dual and loss != "ppo_clip")
    and not (schedule == "clip" and loss in ("topr", "reinforce"))
    and not (schedule == "cap" and loss in ("cispo", "topr"))
]


@pytest.mark.numeric
@pytest.mark.parametrize(("loss", "schedule", "cap", "dual"), CASES)
def test_W3_every_bound_is_tested_on_the_ratio_before_it_is_truncated(loss, schedule, cap, dual):
    config = config_of(
        f"algorithm.loss={loss}", f"algorithm.age_schedule={schedule}", f"algorithm.tis_cap={cap}",
        f"algorithm.dual_clip={dual}",
    )  # fmt: skip
    logits, logprobs, log_mu = softmaxes(12, seed=1, distance=1.0)
    advantages = torch.tensor([1.0, -1.0, 0.5] * 4, dtype=torch.float64)
    ages = torch.tensor([0, 3, 8, 16] * 3)
    ratios = (logprobs.detach() - log_mu).exp().tolist()
    assert max(ratios) > 3 and min(ratios) < 0.5
    gradient, sums = expected_gradient(config, token_data(log_mu, advantages, ages), logits, logprobs, log_mu.exp())
    found = [
        slow_factor(loss, ratio, advantage, age, low=0.2, high=0.28, cap=cap, dual=dual, schedule=schedule)
        for ratio, advantage, age in zip(ratios, advantages.tolist(), ages.tolist(), strict=True)
    ]
    expected = slow_gradient(logprobs, log_mu.exp(), [factor for factor, _ in found])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert int(sums["clipped"]) == sum(clipped for _, clipped in found)


@pytest.mark.numeric
@pytest.mark.parametrize("age", [0, 1, 2, 3, 8, 16, 64])
@pytest.mark.parametrize("overrides", [("algorithm.age_schedule=cap",), ("algorithm.tis_cap=1",)])
def test_W3_a_good_token_beyond_the_clip_has_no_gradient_at_any_age(age, overrides):
    config = config_of(*overrides)
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    data = token_data(torch.tensor([math.log(0.1)], dtype=torch.float64), torch.ones(1).double(), torch.tensor([age]))
    found = ActorObjective(config).losses(data, logprobs, torch.zeros(1).double(), 0.0)
    (gradient,) = torch.autograd.grad(found.losses.sum(), logprobs)
    assert gradient.item() == 0.0
    assert int(found.sums["clipped"]) == 1 and float(found.sums["age_clipped"].sum()) == 1


@pytest.mark.numeric
@pytest.mark.parametrize("proximal", ["recomputed", "interpolated"])
@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "cispo"])
@pytest.mark.parametrize("masks", ["[]", "[band]", "[opsm]"])
def test_W3_with_a_proximal_policy_the_clip_sees_its_ratio_and_masks_see_the_way_to_it(proximal, loss, masks):
    schedule = "none" if loss == "cispo" else "cap"
    config = config_of(
        f"algorithm.loss={loss}", f"algorithm.proximal={proximal}", "algorithm.tis_cap=1.1", f"algorithm.masks={masks}",
        f"algorithm.age_schedule={schedule}",
    )  # fmt: skip
    logits, logprobs, log_mu = softmaxes(12, seed=2, distance=1.0)
    _, start, _ = softmaxes(12, seed=5, distance=0.0)
    advantages = torch.tensor([1.0, -1.0, 0.5] * 4, dtype=torch.float64)
    ages = torch.tensor([0, 3, 8, 16] * 3)
    data = token_data(log_mu, advantages, ages, start=start.detach())
    gradient, sums = expected_gradient(config, data, logits, logprobs, log_mu.exp())
    factors, capped, masked = [], 0, 0
    for token in range(12):
        age, advantage, log_pi = int(ages[token]), float(advantages[token]), logprobs[token].item()
        share = age / (age + 1)
        prox = start[token].item() if proximal == "recomputed" else (1 - share) * float(log_mu[token]) + share * log_pi
        way = math.exp(prox - float(log_mu[token]))
        cap = 1 + 0.1 / (1 + age) if schedule == "cap" else 1.1
        keep = 1.0
        if "band" in masks:
            keep = float(0.5 <= way <= 5.0)
        if "opsm" in masks:
            keep = float(advantage >= 0 or -math.log(way) <= 0.5)
        factor, _ = slow_factor(
            loss, math.exp(log_pi - prox), advantage, age, low=0.2, high=0.28, cap=math.inf, dual=0, schedule="none"
        )
        factors.append(keep * min(way, cap) * factor)
        capped += way > cap
        masked += not keep
    expected = slow_gradient(logprobs, log_mu.exp(), factors)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert int(sums["capped"]) == capped and float(sums["age_masked"].sum()) == masked


@pytest.mark.parametrize("loss", ["cispo", "topr"])
def test_W3_a_loss_that_uses_no_cap_reports_none(loss):
    logits, logprobs, log_mu = softmaxes(12, seed=1, distance=1.0)
    data = token_data(log_mu, torch.ones(12).double(), torch.zeros(12, dtype=torch.int64))
    _, sums = expected_gradient(config_of(f"algorithm.loss={loss}"), data, logits, logprobs, log_mu.exp())
    assert "capped" not in sums


# -- the KL ----------------------------------------------------------------------------------------------------------


def likeness(gradient, true):
    """Cosine between two gradients, and the length of the first over that of the second."""
    cosine = torch.dot(gradient, true) / (gradient.norm() * true.norm())
    return float(cosine), float(gradient.norm() / true.norm())


def kl_gradient(logits, logprobs, reference):
    """Gradient of KL(policy || reference) towards the logits, summed over the whole vocabulary."""
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    return torch.autograd.grad(kl, logits, retain_graph=True)[0], kl.item()


def reward_gradient(config, logits, logprobs, log_mu, reference, estimator):
    """Of the policy gradient whose reward is minus the KL, as the trainer prepares it: `estimator` of each token."""
    data = token_data(log_mu, torch.zeros(50).double(), torch.full((50,), 3), reference, start=logprobs.detach())
    data.advantages = -kl_estimate(logprobs.detach(), reference, estimator)
    return expected_gradient(config, data, logits, logprobs, log_mu.exp())[0]


@pytest.mark.numeric
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distance", [0.045, 0.4])  # KL of about 0.001 and 0.08
def test_W4_the_kl_has_its_gradient_in_either_place(seed, distance):
    logits, logprobs, reference = softmaxes(50, seed, distance)
    true, kl = kl_gradient(logits, logprobs, reference)
    assert kl < 0.3
    pi = logprobs.detach()
    for estimator in KL_ESTIMATORS_BY_PLACE["loss"]:
        config = config_of("algorithm.kl_coef=1", f"algorithm.kl_estimator={estimator}")
        data = token_data(pi, torch.zeros(50).double(), torch.zeros(50, dtype=torch.int64), reference)
        cosine, length = likeness(expected_gradient(config, data, logits, logprobs, pi.exp(), kl_coef=1.0)[0], true)
        # k3's gradient is that of KL(reference || policy), which is near when the KL is small.
        assert cosine > (0.8 if estimator == "k3" and distance > 0.1 else 0.99), estimator
        assert length == pytest.approx(1.0, abs=0.5 if estimator == "k3" and distance > 0.1 else 0.1), estimator
    config = config_of("algorithm.kl_coef=1", "algorithm.kl_in=reward", "algorithm.loss=reinforce")
    cosine, length = likeness(reward_gradient(config, logits, logprobs, pi, reference, "k1"), true)
    assert cosine == pytest.approx(1.0) and length == pytest.approx(1.0)


@pytest.mark.numeric
def test_W4_what_is_refused_has_indeed_another_gradient():
    logits, logprobs, reference = softmaxes(50, 0, 0.045)
    true, _ = kl_gradient(logits, logprobs, reference)
    pi = logprobs.detach()
    config = config_of("algorithm.loss=reinforce")
    for estimator in ("k2", "k3", "abs"):
        cosine, length = likeness(reward_gradient(config, logits, logprobs, pi, reference, estimator), true)
        assert not (cosine > 0.9 and 0.9 < length < 1.1), estimator
    config.algorithm.kl_estimator = "k1"
    data = token_data(pi, torch.zeros(50).double(), torch.zeros(50, dtype=torch.int64), reference)
    assert expected_gradient(config, data, logits, logprobs, pi.exp(), kl_coef=1.0)[0].norm() < 1e-9 * true.norm()


@pytest.mark.numeric
@pytest.mark.parametrize("seed", range(4))
def test_W4_the_weighted_k3_of_old_tokens_is_the_kl_of_the_policy(seed):
    logits, logprobs, reference = softmaxes(50, seed, 0.2)
    log_mu = torch.log_softmax(logits.detach() + 0.8 * softmaxes(50, seed + 100, 0.0)[0].detach(), 0)
    true, kl = kl_gradient(logits, logprobs, reference)
    likenesses = {}
    for estimator, cap in (("k3_weighted", 1e6), ("k3_weighted", 2.0), ("k3", 2.0), ("k2", 2.0)):
        config = config_of("algorithm.kl_coef=1", f"algorithm.kl_estimator={estimator}", f"algorithm.tis_cap={cap}")
        data = token_data(log_mu, torch.zeros(50).double(), torch.full((50,), 3), reference)
        gradient, sums = expected_gradient(config, data, logits, logprobs, log_mu.exp(), kl_coef=1.0)
        likenesses[estimator, cap] = likeness(gradient, true)
        if cap == 1e6:  # nothing is truncated: value and gradient are exact
            found = ActorObjective(config).losses(data, logprobs, torch.zeros(50).double(), 1.0).losses.detach()
            assert float((log_mu.exp() * found).sum()) == pytest.approx(kl)
            assert likenesses[estimator, cap] == pytest.approx((1.0, 1.0))
    assert likenesses["k3_weighted", 2.0][0] > max(likenesses["k3", 2.0][0], likenesses["k2", 2.0][0])


@pytest.mark.parametrize(("place", "estimator"), [("loss", "k3"), ("reward", "k1")])
def test_W4_the_default_depends_on_the_place(place, estimator):
    algorithm = config_of("algorithm.kl_coef=0.1", f"algorithm.kl_in={place}").algorithm
    assert chosen_kl_estimator(algorithm.kl_estimator, algorithm.kl_in) == estimator


@pytest.mark.parametrize(
    ("place", "estimator"), [("reward", "k2"), ("reward", "k3"), ("reward", "abs"), ("loss", "k1"), ("loss", "abs")]
)
def test_W4_an_estimator_without_the_gradient_of_the_kl_is_refused_with_the_reason(place, estimator):
    for more in ([], ["algorithm.i_know=true"]):
        with pytest.raises(ConfigError, match=rf"kl_estimator={estimator}.*(gradient).*set algorithm.kl_estimator"):
            config_of("algorithm.kl_coef=0.1", f"algorithm.kl_in={place}", f"algorithm.kl_estimator={estimator}", *more)


# -- rows ------------------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def policy_of_family(family, **keys):
    keys = TINY | (EXPERTS if "moe" in family or family == "mixtral" else {}) | keys
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **keys)
        return Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float())


def far_apart(policy):
    """Largest difference between log-probs of four completions in plain rows and in shared ones, nats."""
    groups = random_groups(1, 4, seed=3, prompt=(20, 20), completion=(8, 12), vocab=60)
    layouts = []
    for limit in (0, 192):
        (batch,) = pack_groups(groups, 0, 4096, shared_row_tokens=limit)
        assert (batch.rows.segment_ids is not None) == (limit > 0)
        logprobs = policy.logprobs(batch.rows, 1.0)[0].detach().numpy()
        layouts.append([logprobs[batch.sequence_index == np.flatnonzero(batch.rollout_index == n)] for n in range(4)])
    return max(float(np.abs(plain - shared).max()) for plain, shared in zip(*layouts, strict=True))


FAMILIES = [
    *[(name, {}) for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma", "olmo2", "gpt_neox", "smollm3")],
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 8}),
    ("phi3", {"sliding_window": 8}),
    ("mixtral", {"sliding_window": 8}),
    ("starcoder2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ("gemma3_text", {"sliding_window": 8}),
]


@pytest.mark.numeric
@pytest.mark.parametrize(("family", "keys"), FAMILIES)
def test_W6_rows_are_shared_where_the_model_was_seen_to_compute_them_and_change_nothing(family, keys):
    policy = policy_of_family(family, **keys)
    assert policy.allows_shared_rows
    assert far_apart(policy) < 1e-4


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"attention_chunk_size": 64}),
        ("llama", {"alibi": True}),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}),
        ("llama", {"attention_window": [16]}),
    ],
)
def test_W6_attention_of_a_kind_that_is_not_known_keeps_rows_apart(family, keys):
    config = AutoConfig.for_model(family)
    for name, value in keys.items():
        setattr(config, name, value)
    assert not has_known_attention(config)


@pytest.mark.numeric
@pytest.mark.parametrize(("family", "keys"), [("qwen2", {}), ("mistral", {"sliding_window": 8})])
def test_W6_the_canary_goes_through_the_rows_of_training_and_sees_what_they_change(family, keys, monkeypatch):
    policy = policy_of_family(family, **keys)
    sequences = policy.sample_sequences(3, 24, seed=1)
    # What a generator computes: each sequence alone.
    alone = [policy.score([sequence])[0] for sequence in sequences]
    engine = SinglePolicyEngine(policy, Config())
    for ours, theirs in zip(engine.score(sequences), alone, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4
    # Completions that see each other, as in plain rows.
    right = RowLayout.mask
    monkeypatch.setattr(
        RowLayout, "mask", lambda self, *args: right(dataclasses.replace(self, segment_ids=None, _masks={}), *args)
    )
    canary = engine.score(sequences)
    apart = [float(np.abs(ours - theirs).max()) for ours, theirs in zip(canary, alone, strict=True)]
    assert apart[1] < 1e-4, "every second sequence has a plain row"
    assert min(apart[0], apart[2]) > 0.01


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature", ["0.009", "0.0099999", "1e-5", "1e-30", "0", "-1", "2.01", "2.0000001", "7.5", "1e30", "inf", "nan"]
)
def test_W12_a_temperature_that_the_engine_would_replace_or_refuse_is_refused(temperature):
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        config_of(f"sampling.temperature={temperature}")


def test_W12_the_least_and_the_largest_temperature_are_taken():
    for temperature in (0.01, 2.0):
        assert config_of(f"sampling.temperature={temperature}").sampling.temperature == temperature


def test_W12_no_lease_asks_for_a_temperature_that_the_engine_refuses():
    lease = Lease(LeaseKey(LeaseKind.TRAIN, 0, 0), 0, 1.0, np.array([1], np.int32), {}, 1, 1, temperature=2.0)
    assert decode(encode(lease_to_grant(lease, 1), max_bytes=9999), max_bytes=9999).temperature == 2.0
    grant = dataclasses.replace(lease_to_grant(lease, 1), temperature=2.0001)
    with pytest.raises(ProtocolError, match="temperature"):
        decode(encode(grant, max_bytes=9999), max_bytes=9999)


@pytest.mark.slow
def test_W12_the_engine_takes_every_sampling_value_that_is_allowed():
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    (bounds,) = (key.bounds for key in keys() if key.name == "sampling.temperature")
    for temperature in (bounds.minimum, 0.011, 1.0, bounds.maximum):
        assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=bounds.minimum * 0.99).temperature != bounds.minimum * 0.99, "it could be lower"
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=bounds.maximum * 1.01)  # else the bound could be higher
    (least_tokens,) = (key.bounds.minimum for key in keys() if key.name == "sampling.max_new_tokens")
    SamplingParams(temperature=0.0, max_tokens=least_tokens, seed=0, logprobs=0, prompt_logprobs=0)
    assert SamplingParams(seed=2**63 - 1).seed == 2**63 - 1


def test_W12_every_seed_of_a_run_fits_into_what_the_engine_takes():
    (largest,) = (key.bounds.maximum for key in keys() if key.name == "run.seed")
    assert 0 <= largest * RUN_SEED_STRIDE + 10**11 * ORDINAL_SEED_STRIDE < 2**63
    with pytest.raises(ConfigError, match=r"run\.seed"):
        config_of(f"run.seed={largest + 1}")


# -- parts of the reward ---------------------------------------------------------------------------------------------


def scored(parts, weights=None):
    """A rollout whose reward is what its parts come to."""
    rollout = make_rollout([1, 2], reward=weighted_sum(parts, weights or {}))
    rollout.reward_parts = parts
    return rollout


def test_W7_a_part_is_averaged_over_the_rollouts_that_have_it():
    group = make_group(0, [1], [scored({"math": 1.0}), scored({"code": 1.0}), scored({"code": 0.5, "format": 0.25})])
    figures = outcome_metrics([group])
    assert figures == {
        "reward_part/math": 1.0, "reward_part/code": 0.75, "reward_part/format": 0.25, "truncated_share": 0.0,
    }  # fmt: skip


def test_W7_an_evaluation_averages_a_part_over_the_prompts_that_have_it():
    results = EvalResults(version=0, first_ordinal=0, num_prompts=3)
    for ordinal, parts in enumerate([{"math": 1.0}, {"code": 1.0}]):
        group = make_group(ordinal, [1], [scored(parts)])
        results.add(Group(LeaseKey(LeaseKind.EVAL, ordinal, 0), group.prompt_token_ids, group.rollouts))
    figures = results.metrics()
    assert figures.reward_parts == {"math": 1.0, "code": 1.0}
    assert (figures.reward_mean, figures.prompts, figures.prompts_failed) == (1.0, 2, 1)


def test_W7_steps_without_a_policy_age_do_not_count_as_age_0_in_the_summary(tmp_path):
    records = [
        {"kind": "step", "version": 1, "wall_s": 1.0, "policy_age_mean": 3.0, "tokens_trained": 10},
        {"kind": "step", "version": 2, "wall_s": 2.0, "policy_age_mean": None, "tokens_trained": 90},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert summarize(RunRecords(tmp_path)).flow.policy_age_mean == 3.0


def send(rollout, weights=None, **changes):
    """What the desk says of a group with one rollout of a peer."""
    group = make_group(0, [1, 2], [rollout])
    group = dataclasses.replace(group, **changes)
    validate_group(
        result_to_group(group_to_result(group, 1, 1)), vocab_size=9, prompt_token_ids=np.array([1, 2]), num_rollouts=1,
        max_new_tokens=4, oldest_version=0, newest_version=0, weights=weights or {},
        greedy_baseline=group.baseline_reward is not None,
    )  # fmt: skip


BAD_NAMES = ["", "a" * 41, "two words", "a\nb", "\x1b[31mred", "ä", "-x", ".x", "a/b/c", "{answer}", "a\x00"]
BAD_PARTS = [{name: 1.0} for name in BAD_NAMES] + [
    {f"p{n}": 0.0 for n in range(17)},
    {f"p{n}": 0.0 for n in range(32_000)},
    {"x": 1e38},
    {"x": 1.1e6, "y": -1.1e6},
    {"x": math.nan},
    {"x": math.inf, "y": 1.0},
]


@pytest.mark.parametrize("parts", BAD_PARTS, ids=lambda parts: repr(parts)[:20])
def test_D14_impossible_parts_are_refused_by_the_desk_and_where_the_worker_answers(parts):
    with pytest.raises(ProtocolError):
        send(scored(parts))
    with pytest.raises(ProtocolError):
        decode_scored(encode_scored(Scored(parts)))
    assert reward_parts_problem(parts)


@pytest.mark.parametrize(
    ("reward", "parts", "weights"),
    [
        (1.0, {}, {}),
        (1.0, {"exact": 0.0}, {}),
        (1.0, {"exact": 1.0, "format": 1.0}, {}),
        (2.0, {"exact": 1.0}, {"exact": 0.5}),
        (0.5000001, {"exact": 1.0}, {"exact": 0.5}),
        (1e-6, {"exact": 0.0}, {}),
    ],
)
def test_D14_a_reward_that_is_not_the_weighted_sum_of_its_parts_is_refused(reward, parts, weights):
    rollout = make_rollout([1, 2], reward=reward)
    rollout.reward_parts = parts
    with pytest.raises(ProtocolError, match="is not the weighted sum of its parts"):
        send(rollout, weights)


def test_D14_rewards_of_every_size_that_the_pool_makes_are_taken():
    draw = np.random.default_rng(0)
    for _ in range(300):
        names = [f"part-{n}.x_{n}" for n in range(draw.integers(1, 17))]
        parts = {name: float(draw.normal() * 10.0 ** draw.integers(-8, 5)) for name in names}
        weights = {name: float(draw.normal()) for name in names if draw.random() < 0.5}
        send(scored(parts, weights), weights)
        outcome = RewardOutcome(decode_scored(encode_scored(Scored(parts))).parts, weights=weights)
        assert outcome.reward == weighted_sum(parts, weights)


def test_D14_names_and_the_number_of_parts_are_checked_at_the_start_where_the_task_tells_them():
    assert "two words" in check_reward_parts({}, {}, task_parts=["exact", "two words"])[0]
    length = {"kind": "length", "max_tokens": 8}
    own = [f"t{n}" for n in range(10)]
    assert check_reward_parts({f"p{n}": length for n in range(6)}, {}, task_parts=own) == []
    (problem,) = check_reward_parts({f"p{n}": length for n in range(7)}, {}, task_parts=own)
    assert "17 of at most 16" in problem


@pytest.mark.parametrize("reward", [1e38, -1e38, 1.0001e6, math.inf, math.nan])
def test_R2_a_reward_of_any_size_beyond_the_limit_is_refused_by_the_desk(reward):
    weights = {"x": reward}
    with pytest.raises(ProtocolError, match=r"reward .*(is beyond 1e\+06|is not finite)"):
        send(scored({"x": 1.0}, weights), weights)
    with pytest.raises(ProtocolError, match="greedy completion: reward"):
        send(scored({"x": 1.0}), baseline_reward=reward)


@pytest.mark.parametrize("value", [1e38, -2e6, 10**400])
def test_R2_a_reward_beyond_the_limit_is_a_failed_reward_at_the_worker(value):
    task = SimpleNamespace(reward=lambda completion, payload: {"x": value})
    (compute,) = RewardParts(task, {}, {}).begin([Sample("", {})])
    with pytest.raises((RewardError, OverflowError)):
        compute()
    task.reward = lambda completion, payload: {"x": 1.0}
    (compute,) = RewardParts(task, {}, {"x": 1e7}).begin([Sample("", {})])
    with pytest.raises(RewardError, match="weighted sum of the reward's parts 1e.07 is beyond"):
        compute()
    (outcome,) = [RewardPool("a:B", {}, 0, 1.0, weights={"x": 1e7})._outcome(Scored({"x": 1.0}))]
    assert outcome.failed and "is beyond" in outcome.detail

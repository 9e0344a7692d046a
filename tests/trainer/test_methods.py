"""Each method of the configuration, end to end through the trainer, against loops that could not be plainer."""

import math

import numpy as np
import pytest
import torch

from asyncrl.config.loading import load_config
from asyncrl.config.methods import METHODS
from asyncrl.errors import CheckpointError, ModelError, ShapeError
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.critic import Critic, load_critic
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.step import StepRunner
from tests.tolerances import near, slack
from tests.trainer.tiny import (
    critic_of,
    make_group,
    make_rollout,
    policy_of,
    random_groups,
    save_tiny_model,
    tiny_model,
    tiny_policy,
)

pytestmark = pytest.mark.numeric

VERSION = 3
MAX_NEW_TOKENS = 16
BASE = ["model.path=unused", f"sampling.max_new_tokens={MAX_NEW_TOKENS}", "learner.lr=0.01", "learner.grad_clip=1e9"]


def make_trainer(name, *overrides, policy=None, reference=None, critic=None, version=VERSION):
    config = load_config(None, [*BASE, f"algorithm.name={name}", *overrides])
    policy = policy or tiny_policy()
    if config.algorithm.advantage == "gae" and critic is None:
        critic = make_critic()
    engines = engines_for(policy, config, reference=reference, critic=critic)
    return StepRunner(engines, config, version=version)


def make_critic(seed=4):
    critic = Critic(tiny_model(seed=seed).base_model, 16, dtype="float32", device=torch.device("cpu"))
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.3)
    return critic


def old_groups(num_groups=3, group_size=4, seed=5):
    """Groups of several ages: each completion was sampled under versions 1 and 3."""
    groups = random_groups(num_groups, group_size, seed=seed)
    for group in groups:
        group.baseline_reward = 0.25
        for rollout in group.rollouts:
            rollout.reward += 0.1 * rollout.num_tokens  # no two groups alike
            cut = rollout.num_tokens // 2
            spans = [(0, cut, 1), (cut, rollout.num_tokens, 3)] if cut else [(0, rollout.num_tokens, 2)]
            rollout.version_spans = make_rollout(rollout.token_ids, spans=spans).version_spans
    return groups


class Token:
    """One completion token as the loops below see it: floats, and its log-prob with the gradient."""

    def __init__(self, logprob, behaviour, age, advantage, sequence, value=None):
        self.logprob, self.behaviour, self.age = logprob, float(behaviour), int(age)
        self.advantage, self.sequence, self.value = float(advantage), sequence, value
        self.log_ratio = logprob - self.behaviour
        self.ratio = self.log_ratio.exp()
        self.rho = float(self.ratio.detach())


def tokens_of(policy, groups, advantages):
    """Every token of every rollout, in order, one forward pass of the plain model per sequence."""
    tokens, sequence = [], 0
    for group, row in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group.rollouts, row, strict=True):
            prompt, completion = group.prompt_token_ids.tolist(), rollout.token_ids.tolist()
            log_p = torch.log_softmax(policy.model(torch.tensor([prompt + completion])).logits[0], -1)
            for t, token in enumerate(completion):
                age = VERSION - rollout.token_versions()[t]
                logprob = log_p[len(prompt) + t - 1, token]
                tokens.append(Token(logprob, rollout.behaviour_logprobs[t], age, advantage, sequence))
            sequence += 1
    return tokens


def rewards_of(groups):
    return [[rollout.reward for rollout in group.rollouts] for group in groups]


def grpo_advantages(groups):
    out = []
    for row in rewards_of(groups):
        mean, std = np.mean(row), np.std(row, ddof=1)
        out.append([(reward - mean) / (std + 1e-6) for reward in row])
    return out


def whitened(values):
    return (np.asarray(values) - np.mean(values)) / (np.std(values, ddof=1) + 1e-6)


def clipped(ratio, advantage, low, high, cap=math.inf):
    """PPO's clip, tested on the ratio itself; above the cap the value is the cap and the gradient stays."""
    weight = float(ratio.detach())
    if (advantage > 0 and weight > 1 + high) or (advantage < 0 and weight < 1 - low):
        return -min(max(1 - low, min(weight, 1 + high)), cap) * advantage + 0.0 * ratio
    return -(ratio / weight * min(weight, cap)) * advantage


def assert_same_step(trainer, groups, losses, count):
    """The trainer's loss and gradient norm are those of the sum of `losses` over `count`."""
    expected, scale = sum(losses) / count, sum(abs(float(loss.detach())) for loss in losses) / count
    gradients = torch.autograd.grad(expected, policy_of(trainer).trainable_parameters())
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    metrics = trainer.step(groups).metrics
    assert metrics["loss"] == near(float(expected.detach()), scale)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    return metrics


def test_dr_grpo_neither_divides_by_std_nor_by_lengths():
    trainer, groups = make_trainer("dr_grpo"), old_groups()
    advantages = [[reward - np.mean(row) for reward in row] for row in rewards_of(groups)]
    tokens = tokens_of(policy_of(trainer), groups, advantages)
    losses = [clipped(token.ratio, token.advantage, 0.2, 0.28, cap=2.0) for token in tokens]
    assert_same_step(trainer, groups, losses, 12 * MAX_NEW_TOKENS)


def test_rloo_compares_with_the_mean_of_the_others():
    trainer, groups = make_trainer("rloo", "algorithm.tis_cap=1.3"), old_groups()
    advantages = [[r - (sum(row) - r) / (len(row) - 1) for r in row] for row in rewards_of(groups)]
    tokens = tokens_of(policy_of(trainer), groups, advantages)
    losses = [-min(token.rho, 1.3) * token.advantage * token.logprob for token in tokens]
    metrics = assert_same_step(trainer, groups, losses, 12)
    assert 0 < metrics["cap_fraction"] < 1


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_pp_whitens_over_the_batch(name):
    trainer, groups = make_trainer(name), old_groups()
    rows = rewards_of(groups)
    if name == "reinforce_pp_baseline":
        rows = [[reward - np.mean(row) for reward in row] for row in rows]
    tokens = tokens_of(policy_of(trainer), groups, whitened(np.concatenate(rows)).reshape(3, 4))
    losses = [clipped(token.ratio, token.advantage, 0.2, 0.2, cap=2.0) for token in tokens]
    assert_same_step(trainer, groups, losses, len(tokens))


def test_remax_compares_with_the_greedy_completion_and_refuses_a_group_without_one():
    trainer, groups = make_trainer("remax"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, [[reward - 0.25 for reward in row] for row in rewards_of(groups)])
    losses = [-min(token.rho, 2.0) * token.advantage * token.logprob for token in tokens]
    assert_same_step(trainer, groups, losses, 12)
    groups[1].baseline_reward = None
    with pytest.raises(ShapeError, match="no greedy completion"):
        trainer.step(groups)


def test_gspo_has_one_ratio_per_sequence():
    trainer, groups = make_trainer("gspo", "algorithm.clip_low=0.02", "algorithm.clip_high=0.04"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    losses = []
    for sequence in range(12):
        own = [token for token in tokens if token.sequence == sequence]
        ratio = (sum(token.log_ratio for token in own) / len(own)).exp()
        losses.append(clipped(ratio, own[0].advantage, 0.02, 0.04, cap=2.0))
    metrics = assert_same_step(trainer, groups, losses, 12)
    assert 0 < metrics["clip_fraction"] < 1


def test_cispo_keeps_every_tokens_gradient_under_a_bounded_weight():
    trainer, groups = make_trainer("cispo", "algorithm.clip_high=0.2"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    losses = [-min(token.rho, 1.2) * token.advantage * token.logprob for token in tokens]
    assert_same_step(trainer, groups, losses, len(tokens))


def test_topr_tapers_bad_completions_only():
    trainer, groups = make_trainer("topr"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    losses = [-(1 if t.advantage > 0 else min(t.rho, 1.0)) * t.advantage * t.logprob for t in tokens]
    assert_same_step(trainer, groups, losses, len(tokens))


@pytest.mark.parametrize("name", ["decoupled", "a3po"])
def test_decoupled_ppo_clips_around_the_proximal_policy_and_weights_the_way_to_it(name):
    trainer, groups = make_trainer(name, "algorithm.tis_cap=1.2", "algorithm.clip_low=0.01"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    losses = []
    for token in tokens:
        share = 1.0 if name == "decoupled" else token.age / (token.age + 1)
        proximal = token.behaviour + share * (float(token.logprob.detach()) - token.behaviour)
        weight = min(math.exp(proximal - token.behaviour), 1.2)
        losses.append(weight * clipped((token.logprob - proximal).exp(), token.advantage, 0.01, 0.2))
    assert_same_step(trainer, groups, losses, len(tokens))


def test_m2po_leaves_out_the_largest_log_ratios_of_the_whole_batch():
    trainer, groups = make_trainer("m2po", "learner.micro_batch_tokens=40", "model.max_length=40"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    squares = sorted(math.log(token.rho) ** 2 for token in tokens)
    kept = [n for n in range(1, len(squares) + 1) if sum(squares[:n]) / n <= 0.04]
    bound = squares[max(kept) - 1]
    keep_mask = [math.log(token.rho) ** 2 <= bound + 1e-9 for token in tokens]
    losses = [-min(t.rho, 10.0) * t.advantage * t.logprob for t, keep in zip(tokens, keep_mask, strict=True) if keep]
    metrics = assert_same_step(trainer, groups, losses, len(tokens))
    assert metrics["micro_batches"] > 1
    assert (
        metrics["masked_share"] == pytest.approx(1 - sum(keep_mask) / len(keep_mask))
        and 0 < metrics["masked_share"] < 1
    )


def test_masks_and_the_narrowing_with_age_act_token_by_token():
    overrides = ["algorithm.masks=[band]", "algorithm.mask_low=0.8", "algorithm.mask_high=1.25"]
    trainer, groups = make_trainer("grpo", *overrides, "algorithm.age_schedule=clip"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    losses = []
    for token in tokens:
        room = 1 / math.sqrt(1 + token.age)
        inside = 0.8 <= token.rho <= 1.25
        losses.append(inside * clipped(token.ratio, token.advantage, 0.2 * room, 0.28 * room, cap=2.0))
    metrics = assert_same_step(trainer, groups, losses, len(tokens))
    assert 0 < metrics["masked_share"] < 1


def test_a_cap_below_the_clip_leaves_the_clip_alone():
    overrides = ["algorithm.age_schedule=cap", "algorithm.tis_cap=1.3", "algorithm.clip_high=0.28"]
    trainer, groups = make_trainer("grpo", *overrides), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    caps = [1 + 0.3 / (1 + token.age) for token in tokens]
    assert min(caps) < 1.28 < max(caps)
    losses = [clipped(t.ratio, t.advantage, 0.2, 0.28, cap=cap) for t, cap in zip(tokens, caps, strict=True)]
    off = [(t.advantage > 0 and t.rho > 1.28) or (t.advantage < 0 and t.rho < 0.8) for t in tokens]
    capped = [t.rho > cap for t, cap in zip(tokens, caps, strict=True)]
    metrics = assert_same_step(trainer, groups, losses, len(tokens))
    assert metrics["clip_fraction"] == pytest.approx(sum(off) / len(tokens))
    assert metrics["cap_fraction"] == pytest.approx(sum(capped) / len(tokens))


def test_sequence_truncation_weights_whole_completions():
    trainer, groups = make_trainer("reinforce", "algorithm.correction=sequence_tis"), old_groups()
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    rho = {s: math.prod(token.rho for token in tokens if token.sequence == s) for s in range(12)}
    losses = [-min(rho[token.sequence], 2.0) * token.advantage * token.logprob for token in tokens]
    metrics = assert_same_step(trainer, groups, losses, len(tokens))
    assert metrics["cap_fraction"] == pytest.approx(sum(rho[t.sequence] > 2.0 for t in tokens) / len(tokens))


def test_kl_in_the_reward_lowers_the_reward_of_completions_that_left_the_reference():
    reference = tiny_policy(seed=9).freeze()
    overrides = ["algorithm.kl_coef=0.3", "algorithm.kl_in=reward"]
    trainer, groups = make_trainer("grpo", *overrides, reference=reference), old_groups()
    zeros = [[0.0] * 4] * 3
    own, others = tokens_of(policy_of(trainer), groups, zeros), tokens_of(reference, groups, zeros)
    kl = [0.0] * 12
    for token, other in zip(own, others, strict=True):
        kl[token.sequence] += float(token.logprob.detach()) - float(other.logprob.detach())
    for index, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        rollout.reward -= 0.3 * kl[index]
    tokens = tokens_of(policy_of(trainer), groups, grpo_advantages(groups))
    for index, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        rollout.reward += 0.3 * kl[index]
    losses = [clipped(token.ratio, token.advantage, 0.2, 0.28, cap=2.0) for token in tokens]
    assert_same_step(trainer, groups, losses, len(tokens))


def test_an_adaptive_kl_coefficient_rises_above_its_target_and_survives_a_checkpoint():
    reference = tiny_policy(seed=9).freeze()
    trainer = make_trainer("grpo", "algorithm.kl_coef=0.1", "algorithm.kl_target=1e-6", reference=reference)
    metrics = trainer.step(old_groups()).metrics
    assert metrics["kl_coef"] == 0.1 and trainer.kl_coef == pytest.approx(0.102)
    other = make_trainer("grpo", "algorithm.kl_coef=0.1", "algorithm.kl_target=1e-6", reference=reference)
    other.load_state(trainer.state())
    assert other.kl_coef == trainer.kl_coef


# -- the critic ----------------------------------------------------------------------------------------------


def slow_values(critic, groups):
    """Value of the state before each token, one forward pass per sequence."""
    out = []
    for group in groups:
        for rollout in group.rollouts:
            prompt = group.prompt_token_ids.tolist()
            tokens = torch.tensor([prompt + rollout.token_ids.tolist()])
            hidden = critic.trunk(tokens).last_hidden_state[0]
            out.append(critic.head(hidden)[len(prompt) - 1 : -1, 0])
    return out


def slow_targets(reward, values, rho, kind, lam):
    """Advantages and targets of one sequence by the defining sums; the reward comes with the last token."""
    length = len(values)
    steps = [0.0] * (length - 1) + [reward]
    after = [*values[1:], 0.0]
    ratios = [1.0] * length if kind == "gae" else [min(ratio, 1.0) for ratio in rho]
    deltas = [steps[t] + after[t] - values[t] for t in range(length)]
    sums = [
        sum(deltas[s] * lam ** (s - t) * math.prod(ratios[t + 1 : s + 1]) for s in range(t, length))
        for t in range(length)
    ]
    targets = [value + ratio * total for value, ratio, total in zip(values, ratios, sums, strict=True)]
    if kind != "vtrace":
        return sums, targets
    following = [*targets[1:], 0.0]
    return [steps[t] + following[t] - values[t] for t in range(length)], targets


@pytest.mark.parametrize("kind", ["gae", "is_gae", "vtrace"])
def test_ppo_with_a_critic_equals_the_slow_loop(kind):
    critic = make_critic()
    trainer = make_trainer("ppo", f"algorithm.value_targets={kind}", "algorithm.lam=0.9", critic=critic)
    groups = old_groups()
    tokens = tokens_of(policy_of(trainer), groups, [[0.0] * 4] * 3)
    values = slow_values(critic, groups)
    advantages, targets = [], []
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for sequence, rollout in enumerate(rollouts):
        rho = [token.rho for token in tokens if token.sequence == sequence]
        found = slow_targets(rollout.reward, values[sequence].tolist(), rho, kind, 0.9)
        advantages += found[0]
        targets += found[1]
    losses = []
    for token, advantage in zip(tokens, whitened(advantages), strict=True):
        losses.append(clipped(token.ratio, float(advantage), 0.2, 0.2, cap=2.0))
    value_loss = 0.5 * (torch.cat(values) - torch.tensor(targets)).square().mean()
    gradients = torch.autograd.grad(value_loss, list(critic.parameters()), allow_unused=True)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    metrics = assert_same_step(trainer, groups, losses, len(tokens))
    assert metrics["critic_grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["value_loss"] == pytest.approx(float(value_loss.detach()), rel=1e-4)
    residual, spread = np.var(np.array(targets) - torch.cat(values).detach().numpy()), np.var(targets)
    assert metrics["explained_variance"] == pytest.approx(1 - residual / spread, abs=1e-3)


def test_a_critic_learns_the_return_of_its_states():
    groups = [make_group(n, [n + 1], [make_rollout([5, 6], reward=float(n % 2)) for _ in range(4)]) for n in range(6)]
    trainer = make_trainer("ppo", "critic.lr=0.01", "algorithm.value_targets=gae", "learner.lr=1e-9")
    explained = [trainer.step(groups).metrics["explained_variance"] for _ in range(40)]
    assert explained[0] < 0.5 < 0.9 < explained[-1]


def test_a_shared_trunk_is_trained_by_both_losses():
    policy = tiny_policy()
    critic = Critic(None, 16, dtype="float32", device=torch.device("cpu"))
    trainer = make_trainer("ppo", "critic.trunk=shared", policy=policy, critic=critic)
    assert critic.is_shared and trainer.step(old_groups()).metrics["critic_grad_norm"] > 0
    before = [parameter.detach().clone() for parameter in policy.trainable_parameters()]
    trainer.step(old_groups())  # the head has left 0: now the trunk feels the value loss as well
    alone = make_trainer("ppo", "critic.trunk=shared", "critic.coef=0", critic=critic)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.trainable_parameters(), strict=True))
    assert alone.config.critic.coef == 0.0


def test_the_actor_rests_while_the_critic_warms_up():
    trainer = make_trainer("ppo", "critic.warmup_steps=2", version=0)
    groups = random_groups(3, 4)
    actor = [parameter.detach().clone() for parameter in policy_of(trainer).trainable_parameters()]
    head = critic_of(trainer).head.weight.detach().clone()
    for _ in range(2):
        metrics = trainer.step(groups).metrics
        assert "grad_norm" not in metrics and metrics["critic_grad_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(actor, policy_of(trainer).trainable_parameters(), strict=True))
    assert not torch.equal(head, critic_of(trainer).head.weight)
    assert trainer.step(groups).metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(actor, policy_of(trainer).trainable_parameters(), strict=True))


def test_the_critic_starts_from_the_folder_it_is_given_and_only_ppo_has_one(tmp_path):
    folder = save_tiny_model(tmp_path / "model", seed=3)
    policy = Policy.load(str(folder))
    config = load_config(None, [*BASE[1:], f"model.path={folder}", "algorithm.name=ppo"])
    critic = load_critic(config, policy)
    assert not critic.is_shared and len(list(critic.parameters())) > 10
    assert torch.equal(critic.trunk.norm.weight, policy.model.model.norm.weight)
    assert float(critic.head.weight.detach().abs().sum()) == 0.0
    config.critic.trunk = "shared"
    assert len(list(load_critic(config, policy).parameters())) == 2
    config.algorithm.advantage = "group"
    assert load_critic(config, policy) is None
    config = load_config(None, [*BASE, "algorithm.name=ppo", f"critic.path={tmp_path / 'nowhere'}"])
    with pytest.raises(ModelError, match="nowhere"):
        load_critic(config, policy)


def test_a_run_with_a_critic_resumes_bit_for_bit(tmp_path):
    batches = [random_groups(3, 4, seed=seed) for seed in range(4)]
    whole = make_trainer("ppo", version=0)
    for batch in batches:
        whole.step(batch)
    first = make_trainer("ppo", version=0)
    for batch in batches[:2]:
        first.step(batch)
    save_checkpoint(tmp_path, first, run_epoch=1)
    second = make_trainer("ppo", critic=make_critic(seed=8), version=0)
    assert load_checkpoint(tmp_path, second).version == 2
    for batch in batches[2:]:
        second.step(batch)
    for expected, restored in zip(critic_of(whole).parameters(), critic_of(second).parameters(), strict=True):
        assert torch.equal(expected, restored)
    for expected, restored in zip(
        policy_of(whole).trainable_parameters(),
        policy_of(second).trainable_parameters(),
        strict=True,
    ):
        assert torch.equal(expected, restored)


def test_a_checkpoint_with_a_critic_is_not_resumed_without_one(tmp_path):
    save_checkpoint(tmp_path, make_trainer("ppo"), run_epoch=1)
    with pytest.raises(CheckpointError, match="with a critic"):
        load_checkpoint(tmp_path, make_trainer("grpo"))


# -- several updates per step --------------------------------------------------------------------------------


def test_a_step_of_several_updates_is_one_version_and_clips_around_its_start():
    trainer = make_trainer("decoupled", "learner.epochs=2", "learner.mini_batches=3", "learner.lr=0.05")
    result = trainer.step(old_groups(6))
    assert result.version == VERSION + 1
    steps = {int(state["step"]) for state in trainer.engines.actor.optimizer.state.values()}
    assert steps == {6}
    assert result.metrics["clip_fraction"] > 0  # with one update per step the ratio would be 1 everywhere


def test_mini_batches_of_one_step_depend_on_seed_and_version_alone():
    weights = []
    for _ in range(2):
        trainer = make_trainer("grpo", "learner.mini_batches=3")
        trainer.step(list(reversed(old_groups(6))) if weights else old_groups(6))
        weights.append([parameter.detach().clone() for parameter in policy_of(trainer).trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_any_cut_into_micro_batches_makes_the_same_step(name):
    results = []
    for budget in (10_000, 30):
        trainer = make_trainer(name, f"learner.micro_batch_tokens={budget}", "model.max_length=30")
        results.append(trainer.step(old_groups()).metrics)
    whole, parts = results
    assert parts["micro_batches"] > whole["micro_batches"]
    for key in whole.keys() - {"micro_batches", "model_inputs"}:
        assert parts[key] == pytest.approx(whole[key], rel=1e-3, abs=slack(1.0)), key


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_makes_rewarded_completions_likelier(name):
    """On-policy, with the completions' log-probs taken anew before each step."""
    policy = tiny_policy()
    good, bad = [1, 2, 3], [4, 5, 6]
    trainer = make_trainer(name, "critic.lr=0.003", "learner.lr=0.003", policy=policy, version=0)

    def logprobs():
        return [policy.score([[9, *tokens]])[0] for tokens in (good, bad)]

    before = [row.sum() for row in logprobs()]
    for version in range(12):
        rows, groups = logprobs(), []
        for ordinal in range(2):
            rollouts = [
                make_rollout(tokens, row, reward=reward, spans=[(0, 3, version)])
                for tokens, row, reward in ((good, rows[0], 1.0), (bad, rows[1], 0.0), (bad, rows[1], 0.0))
            ]
            groups.append(make_group(ordinal, [9], rollouts))
            groups[-1].baseline_reward = 0.5
        trainer.step(groups)
    after = [row.sum() for row in logprobs()]
    assert after[0] > before[0] + 0.5
    assert after[0] - after[1] > before[0] - before[1] + 0.5

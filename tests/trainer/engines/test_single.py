"""The engine of one device: its part of the border that `engines.base` describes."""

import math

import pytest
import torch

from asyncrl.config import Config
from asyncrl.errors import NonFiniteError
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.base import Outputs, Want
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.packing import pack_groups
from asyncrl.trainer.step import StepRunner
from tests.trainer.tiny import critic_of, policy_of, random_groups, tiny_model, tiny_policy

LOGPROBS = Want(logprobs=True, entropies=True)
VALUES = Want(values=True)


def make_config():
    config = Config()
    config.learner.lr = config.critic.lr = 1e-2
    return config


def make_engines(*, trunk=None, with_reference=False):
    """Engines of a tiny policy; `trunk` is "own", "shared" or None for no critic."""
    policy = tiny_policy()
    critic = None
    if trunk is not None:
        base = tiny_model(seed=4).base_model if trunk == "own" else None
        critic = Critic(base, 16, dtype="float32", device=torch.device("cpu"))
        with torch.no_grad():
            critic.head.weight.normal_(generator=torch.Generator().manual_seed(4))
    reference = tiny_policy(seed=9).freeze() if with_reference else None
    return engines_for(policy, make_config(), critic=critic, reference=reference)


def rows(token_budget=40):
    return [batch.rows for batch in pack_groups(random_groups(3, 4), 0, token_budget)]


def sum_of_logprobs(index: int, outputs: Outputs):
    return outputs.logprobs.sum(), {"seen": torch.tensor(float(index))}


def sum_of_values(index: int, outputs: Outputs):
    return outputs.values.square().sum(), {}


def sum_of_both(index: int, outputs: Outputs):
    return outputs.logprobs.sum() + outputs.values.square().sum(), {}


def weights(part):
    return {name: tensor.clone() for name, tensor in part.weights.items()}


def same(left, right):
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_only_what_is_wanted_comes_out_and_without_a_gradient():
    actor = make_engines(trunk="shared", with_reference=True).actor
    (logprobs,) = actor.forward(rows(1000), LOGPROBS, 1.0)
    (values,) = actor.forward(rows(1000), VALUES, 1.0)
    (frozen,) = actor.forward(rows(1000), Want(logprobs=True, frozen=True), 1.0)
    assert logprobs.values is None and values.logprobs is None and values.entropies is None
    assert logprobs.logprobs.shape == logprobs.entropies.shape == values.values.shape
    assert frozen.logprobs is not None and frozen.entropies is None
    assert not (logprobs.logprobs.requires_grad or values.values.requires_grad or frozen.logprobs.requires_grad)
    assert (logprobs.logprobs - frozen.logprobs).abs().max() > 1e-2


def test_gradients_add_up_over_micro_batches_and_the_loss_is_called_for_each_in_order():
    actor = make_engines().actor
    seen = []

    def loss(index, outputs):
        seen.append(index)
        return sum_of_logprobs(index, outputs)

    parts = actor.accumulate(rows(), LOGPROBS, 1.0, loss, max_norm=math.inf)
    whole = actor.accumulate(rows(1000), LOGPROBS, 1.0, sum_of_logprobs, max_norm=math.inf)
    assert seen == list(range(len(rows()))) and len(seen) > 2
    assert parts.policy_norm == pytest.approx(whole.policy_norm, rel=1e-4)
    assert parts.critic_norm is None
    assert float(parts.sums["seen"]) == sum(seen)


def test_gradients_move_nothing_until_the_update_and_nothing_at_all_once_discarded():
    actor = make_engines().actor
    before = weights(actor.state().policy)
    actor.accumulate(rows(), LOGPROBS, 1.0, sum_of_logprobs, max_norm=1.0)
    assert same(before, actor.state().policy.weights)
    actor.discard()
    actor.update()
    assert same(before, actor.state().policy.weights)
    assert not actor.state().policy.optimizer
    actor.accumulate(rows(), LOGPROBS, 1.0, sum_of_logprobs, max_norm=1.0)
    actor.update()
    assert not same(before, actor.state().policy.weights)


def test_a_value_head_has_a_norm_and_an_update_of_its_own_and_may_be_trained_alone():
    actor = make_engines(trunk="shared").actor
    policy, head = weights(actor.state().policy), weights(actor.state().critic)
    both = Want(logprobs=True, values=True)
    alone = actor.accumulate(rows(), both, 1.0, sum_of_both, max_norm=1.0, train_policy=False)
    actor.update()
    assert alone.policy_norm is None and alone.critic_norm > 0
    assert same(policy, actor.state().policy.weights) and not same(head, actor.state().critic.weights)
    together = actor.accumulate(rows(), both, 1.0, sum_of_both, max_norm=1.0)
    actor.update()
    assert together.policy_norm > 0 and together.critic_norm > 0
    assert not same(policy, actor.state().policy.weights)


def test_an_engine_with_nothing_to_train_is_asked_for_its_sums_alone():
    actor = make_engines().actor
    gradients = actor.accumulate(rows(), LOGPROBS, 1.0, sum_of_logprobs, max_norm=1.0, train_policy=False)
    assert gradients.policy_norm is None and gradients.critic_norm is None
    assert "seen" in gradients.sums
    assert all(parameter.grad is None for parameter in actor.policy.trainable_parameters())


def test_without_micro_batches_the_gradient_is_zero_and_momentum_goes_on():
    actor = make_engines().actor
    actor.accumulate(rows(), LOGPROBS, 1.0, sum_of_logprobs, max_norm=1.0)
    actor.update()
    before = weights(actor.state().policy)
    assert actor.accumulate([], LOGPROBS, 1.0, sum_of_logprobs, max_norm=1.0).policy_norm == 0.0
    actor.update()
    assert not same(before, actor.state().policy.weights)


@pytest.mark.parametrize("trunk", [None, "own", "shared"])
def test_a_state_is_loaded_into_whichever_engines_there_are(trunk):
    first, second = make_engines(trunk=trunk), make_engines(trunk=trunk)
    for engine, want, loss in ((first.actor, LOGPROBS, sum_of_logprobs), (first.critic, VALUES, sum_of_values)):
        if engine is not None:
            engine.accumulate(rows(), want, 1.0, loss, max_norm=1.0)
            engine.update()
    second.load_state(first.state())
    assert same(first.state().policy.weights, second.state().policy.weights)
    moments = second.state().policy.optimizer
    assert moments.keys() == set(first.state().policy.trained)
    assert {float(moment["step"]) for moment in moments.values()} == {1.0}
    for name, moment in first.state().policy.optimizer.items():
        assert same(moment, moments[name])
    assert (second.state().critic is None) == (trunk is None)
    if trunk is not None:
        assert same(first.state().critic.weights, second.state().critic.weights)


def test_a_critic_whose_gradient_is_not_finite_holds_the_actor_back_too():
    config = make_config()
    config.algorithm.advantage = "gae"
    engines = make_engines(trunk="own")
    runner = StepRunner(engines, config)
    before = weights(engines.state().policy)
    with torch.no_grad():
        critic_of(runner).trunk.norm.weight.mul_(1e30)  # values that are finite and whose squares are not
        config.critic.value_clip = 0.0
    with pytest.raises(NonFiniteError, match="critic: gradient norm .* not finite; no update made"):
        runner.step(random_groups(3, 4))
    assert same(before, engines.state().policy.weights)
    assert all(parameter.grad is None for parameter in policy_of(runner).trainable_parameters())
    assert runner.version == 0

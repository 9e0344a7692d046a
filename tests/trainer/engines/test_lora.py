"""Adapters: where they sit, what they are called, switched off, and merged."""

import numpy as np
import pytest
import torch

from asyncrl.trainer.engines.lora import merged_state, plain_name
from asyncrl.trainer.engines.trainable import apply_update, named_parameters
from asyncrl.trainer.packing import pack_groups
from tests.trainer.engines.test_trainable import SEQUENCES, lora, policy_with, trainer_with
from tests.trainer.tiny import policy_of, random_groups, tiny_model, tiny_policy


def test_without_targets_every_linear_layer_below_the_head_gets_an_adapter():
    model = tiny_model(tied=False)
    apply_update(model, lora(lora_targets=[]))
    trained = [name for name, parameter in named_parameters(model) if parameter.requires_grad]
    adapted = {name.split(".")[-3] for name in trained}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adapters_sit_on_the_targets_only_and_are_drawn_by_the_seed():
    policy = policy_with(lora())
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.trained_tensors().items()}
    stems = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert set(shapes) == {f"{stem}.lora_{half}.weight" for stem in stems for half in "AB"}
    assert shapes["model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.0.mlp.down_proj.lora_B.weight"] == (16, 4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    same, other = policy_with(lora()).trained_tensors(), policy_with(lora(), seed=1).trained_tensors()
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in policy.trained_tensors().items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == name.endswith("lora_B.weight")


def test_names_outside_are_those_of_the_checkpoint():
    for inside, outside in [
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ]:
        assert plain_name(inside) == outside
    plain = [name for name, _ in tiny_policy().named_sync_parameters()]
    assert [name for name, _ in policy_with(lora()).named_sync_parameters()] == plain


def test_a_fresh_adapter_changes_no_log_prob_and_not_the_architecture():
    plain, adapted = tiny_policy(), policy_with(lora())
    for ours, theirs in zip(adapted.score(SEQUENCES), plain.score(SEQUENCES), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert adapted.architecture == plain.architecture


def test_asking_the_reference_between_forward_and_backward_changes_no_gradient():
    gradients = []
    for ask in (False, True):
        policy = policy_with(lora())
        with torch.no_grad():
            for value in policy.trainable_parameters():
                value.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
        (batch,) = pack_groups(random_groups(2, 2), 0, 4096)
        logprobs, _ = policy.logprobs(batch.rows, 1.0)
        if ask:
            with torch.no_grad():
                there, _ = policy.initial_policy().logprobs(batch.rows, 1.0)
            assert (there - logprobs).abs().max() > 1e-3
        logprobs.sum().backward()
        gradients.append([value.grad for value in policy.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(value.requires_grad for value in policy.trainable_parameters())


def test_adapters_are_on_again_after_an_error_in_the_reference():
    policy = policy_of(trainer_with(lora(), steps=2))
    before = policy.score(SEQUENCES)[0]
    with pytest.raises(ValueError, match="at least 2 tokens"):
        policy.initial_policy().score([[1]])
    np.testing.assert_array_equal(policy.score(SEQUENCES)[0], before)


def test_the_merged_state_of_a_model_without_adapters_is_its_state():
    model = tiny_model()
    state, merged = model.state_dict(), merged_state(model)
    assert list(state) == list(merged)
    assert all(state[name].data_ptr() == merged[name].data_ptr() for name in state)

"""The canary's log-probs at the learner against a policy that was given the weights as generators get them."""

import numpy as np
import pytest
import torch

from asyncrl.config import Config
from asyncrl.desk.daemon import CANARY_TOLERANCE
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.single import SinglePolicyEngine
from asyncrl.trainer.engines.trainable import named_parameters
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.plan.records import MEAN_SHARE
from tests.tolerances import STEPS, assert_near
from tests.trainer.engines.test_trainable import UPDATES, lora, policy_with
from tests.trainer.tiny import tiny_policy

pytestmark = pytest.mark.numeric

MODES = UPDATES | {"lora, merged": lora(lora_sync="merged")}


def moved_policy(mode, dtype):
    policy = policy_with(MODES[mode])
    policy.dtype = dtype
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return policy


def as_a_generator_has_it(policy):
    """The slow, obvious reference: an ordinary model with the weights that travel, in the dtype in which they do."""
    source = policy.sync_source()
    wire = torch.bfloat16 if policy.dtype == "bfloat16" else None
    buffer = SnapshotBuffer(source.named, 4096, wire, adapted=source.adapted, patch=source.patch)
    buffer.snapshot()
    sent = {name: tensor.float() for name, tensor in buffer.views()}
    other = policy_with(policy.update)
    own = dict(named_parameters(other.model))
    with torch.no_grad():
        for name, parameter in named_parameters(policy.model):
            own[name].copy_(parameter)
        for name, tensor in sent.items():
            own[name].copy_(tensor)
    copy = tiny_policy()
    state = merged_state(other.model)
    if source.adapted:
        state |= sent
    copy.model.load_state_dict(state)
    copy.dtype = policy.dtype
    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_what_rounding_on_the_wire_costs_is_far_below_the_canarys_limits(mode, dtype):
    policy = moved_policy(mode, dtype)
    canary = policy.sample_sequences(4, 32, seed=0)
    ours = SinglePolicyEngine(policy, Config()).score(canary)
    theirs = as_a_generator_has_it(policy).score(canary)
    apart = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    assert [row.dtype for row in ours] == [np.float32] * 4 and [len(row) for row in ours] == [31] * 4
    assert apart.max() < CANARY_TOLERANCE[dtype] / 3
    assert apart.mean() < MEAN_SHARE * CANARY_TOLERANCE[dtype] / 3


def test_scoring_leaves_the_policy_as_it_is_and_goes_through_both_layouts():
    policy = moved_policy("full", "float32")
    engine = SinglePolicyEngine(policy, Config())
    before = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in named_parameters(policy.model)]
    canary = policy.sample_sequences(3, 12, seed=0)
    calls = []
    for name in ("score", "score_in_shared_rows"):
        real = getattr(policy, name)
        setattr(policy, name, lambda rows, real=real, name=name: calls.append((name, len(rows))) or real(rows))
    scores = engine.score(canary)
    assert calls == [("score_in_shared_rows", 2), ("score", 1)]
    for row, tokens in zip(scores, canary, strict=True):
        assert_near(row, policy.score([tokens])[0], steps=STEPS)
    after = [(name, id(p), p.requires_grad, p) for name, p in named_parameters(policy.model)]
    assert [row[:3] for row in before] == [row[:3] for row in after]
    assert all(torch.equal(old[3], new[3]) and new[3].grad is None for old, new in zip(before, after, strict=True))

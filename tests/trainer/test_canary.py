"""The canary from a snapshot against a policy that was given the snapshot's weights, while the trained one moves on."""

import threading

import numpy as np
import pytest
import torch

from asyncrl.trainer.canary import SnapshotScorer
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.trainable import named_parameters
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.tolerances import STEPS, assert_near
from tests.trainer.engines.test_trainable import SEQUENCES, UPDATES, lora, policy_with, trainer_with
from tests.trainer.tiny import policy_of, random_groups, tiny_policy

pytestmark = pytest.mark.numeric

MODES = UPDATES | {"lora, merged": lora(lora_sync="merged")}


def snapshot_of(policy, wire_dtype=None):
    source = policy.sync_source()
    buffer = SnapshotBuffer(source.named, 4096, wire_dtype, adapted=source.adapted, patch=source.patch)
    buffer.snapshot()
    return buffer


def move(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def plain_copy(policy, *, tied, rounded):
    """The slow, obvious reference: an ordinary model with the policy's weights as they are on the wire."""
    copy = tiny_policy(tied=tied)
    state = merged_state(policy.model)
    published = {name for name, _ in policy.sync_source().named} if rounded else set()
    copy.model.load_state_dict({n: t.bfloat16().float() if n in published else t for n, t in state.items()})
    copy.dtype = policy.dtype
    return copy


def assert_close(ours, theirs, steps=STEPS):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == np.float32
        assert_near(mine, other, steps=steps)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mode", MODES)
def test_a_snapshot_is_scored_as_it_was_whatever_training_does_to_the_policy_since(mode, tied):
    policy = policy_with(MODES[mode], tied=tied)
    move(policy, 1)
    scorer = SnapshotScorer(policy)
    before, expected = snapshot_of(policy), plain_copy(policy, tied=tied, rounded=False).score(SEQUENCES)
    move(policy, 2)
    after, expected_after = snapshot_of(policy), policy.score(SEQUENCES)
    assert np.abs(expected[0] - expected_after[0]).max() > 1e-2, "the two are to be told apart"
    for _ in range(2):
        assert_close(scorer(SEQUENCES, before), expected)
        assert_close(scorer(SEQUENCES, after), expected_after)


@pytest.mark.parametrize("mode", [name for name in MODES if name != "lora"])  # adapters are merged by nobody there
def test_what_travels_in_bfloat16_is_scored_with_the_weights_that_travelled(mode):
    policy = policy_with(MODES[mode])
    policy.dtype = "bfloat16"
    move(policy, 1)
    scorer, buffer = SnapshotScorer(policy), snapshot_of(policy, torch.bfloat16)
    expected = plain_copy(policy, tied=True, rounded=True).score(SEQUENCES)
    move(policy, 2)
    assert_close(scorer(SEQUENCES, buffer), expected, steps=8)


def test_adapters_in_bfloat16_are_scored_as_the_rounded_adapters():
    policy = policy_with(MODES["lora"])
    policy.dtype = "bfloat16"
    move(policy, 1)
    scorer, buffer = SnapshotScorer(policy), snapshot_of(policy, torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.copy_(parameter.bfloat16())
    expected = policy.score(SEQUENCES)
    move(policy, 2)
    assert_close(scorer(SEQUENCES, buffer), expected, steps=8)


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_keeps_its_parameters_and_what_of_them_is_trained(mode):
    policy = policy_with(MODES[mode])
    before = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in named_parameters(policy.model)]
    scores = policy.score(SEQUENCES)
    SnapshotScorer(policy)(SEQUENCES, snapshot_of(policy))
    after = [(name, id(p), p.requires_grad, p) for name, p in named_parameters(policy.model)]
    assert [row[:3] for row in before] == [row[:3] for row in after]
    assert all(torch.equal(old[3], new[3]) for old, new in zip(before, after, strict=True))
    assert_close(policy.score(SEQUENCES), scores, steps=0)


def test_a_scorer_has_no_memory_of_its_own_for_what_is_published():
    policy = policy_with(UPDATES["full"])
    scorer, buffer = SnapshotScorer(policy), snapshot_of(policy)
    own = list(scorer._policy.model.parameters())
    scorer(SEQUENCES, buffer)
    assert sum(parameter.numel() for parameter in own) == 0, "a snapshot is let go of after the call"


@pytest.mark.parametrize(
    ("mode", "dtype"), [("full", "float32"), ("full", "bfloat16"), ("lora, merged", "float32"), ("lora", "bfloat16")]
)
def test_scoring_in_another_thread_changes_neither_the_training_nor_the_scores(mode, dtype):
    alone, trainer = trainer_with(MODES[mode]), trainer_with(MODES[mode])
    policy = policy_of(trainer)
    policy_of(alone).dtype = policy.dtype = dtype
    for step in range(6):
        alone.step(random_groups(3, 4, seed=step))
    scorer, buffer = SnapshotScorer(policy), snapshot_of(policy, getattr(torch, dtype))
    expected, differences, stopped = scorer(SEQUENCES, buffer), [], threading.Event()

    def score():
        while not stopped.is_set():
            scores = scorer(SEQUENCES, buffer)
            differences.append(max(float(np.abs(a - b).max()) for a, b in zip(scores, expected, strict=True)))

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    try:
        for step in range(6):
            trainer.step(random_groups(3, 4, seed=step))
    finally:
        stopped.set()
        thread.join(20.0)
    assert differences and max(differences) == 0.0
    for name, value in policy.trained_tensors().items():
        assert torch.equal(value, policy_of(alone).trained_tensors()[name]), name

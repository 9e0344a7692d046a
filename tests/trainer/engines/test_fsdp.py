"""The sharded engine in a world of one rank, where its numbers are those of the single engine to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.trainer.engines import recomputing
from asyncrl.trainer.engines.fsdp import FSDPModule, layers_of
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.packing import plain_rows
from asyncrl.trainer.world import World
from tests.trainer.ranks.cases import CASES, LORA, PPO, Case, groups_of, runner_of

pytestmark = pytest.mark.bits


def sharded(case: Case):
    return runner_of(case, World.alone())


def weights_of(runner):
    return {name: local(tensor).clone() for name, tensor in runner.state().engines.policy.weights.items()}


def figures(runner, case: Case, steps: int):
    return [runner.step(groups_of(case, number)).metrics for number in range(steps)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "not_packed"])
def test_steps_are_those_of_the_single_engine(name):
    case = CASES[name]
    ours, expected = sharded(case), runner_of(case)
    for mine, theirs in zip(figures(ours, case, 2), figures(expected, case, 2), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=1e-12)
    assert weights_of(ours).keys() == weights_of(expected).keys()


def test_gradients_summed_after_each_pass_are_those_summed_at_the_end():
    """As on a GPU, where whole gradients of a large model would not fit."""
    case = CASES["ppo_shared_trunk"]
    ours, expected = sharded(case), sharded(case)
    assert not ours.engines.actor.sums_each_pass
    ours.engines.actor.sums_each_pass = True
    for mine, theirs in zip(figures(ours, case, 3), figures(expected, case, 3), strict=True):
        assert theirs["micro_batches"] > 1
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["selective", "full"])
def test_layers_compute_again_and_parameters_keep_their_names(name, monkeypatch):
    calls = []
    honest = recomputing.checkpoint
    monkeypatch.setattr(recomputing, "checkpoint", lambda *a, **k: calls.append(a) or honest(*a, **k))
    runner, plain = sharded(CASES[name]), sharded(CASES["grpo"])
    runner.step(groups_of(CASES[name], 0))
    passes = runner.step(groups_of(CASES[name], 0)).metrics["micro_batches"]
    assert len(calls) == 2 * passes * 2  # steps, passes, layers
    assert list(weights_of(runner)) == list(weights_of(plain))


def test_each_layer_is_gathered_by_itself():
    layers = layers_of(runner_of(CASES["grpo"]).engines.actor.policy.model)
    assert len(layers) == 2
    modules = sharded(CASES["ppo_shared_trunk"]).engines.actor.root.modules()
    assert sum(isinstance(module, FSDPModule) for module in modules) == len(layers) + 2  # the root and the value head


def test_selective_recomputation_keeps_products_and_attention():
    kept = {str(operator) for operator in recomputing.expensive_operators()}
    assert {"aten.mm.default", "aten.addmm.default", "torch_attn._varlen_attn.default"} <= kept
    assert any("attention" in name for name in kept)


def test_a_state_goes_over_to_another_engine():
    case = CASES["ppo_own_trunk"]
    first, second = sharded(case), sharded(case)
    figures(first, case, 2)
    second.load_state(first.state())
    after = [runner.step(groups_of(case, 2)).metrics for runner in (first, second)]
    assert after[0] == after[1]


def half(case: Case, monkeypatch):
    """The case with model.dtype=bfloat16."""
    from tests.trainer.ranks import cases

    config_of = cases.config_of

    def config_in_half(of):
        config = config_of(of)
        config.model.dtype = "bfloat16"
        return config

    policy = cases.Policy
    monkeypatch.setattr(cases, "config_of", config_in_half)
    monkeypatch.setattr(cases, "Policy", lambda model: policy(model, dtype="bfloat16"))
    return sharded(case)


@pytest.mark.parametrize("settings", [{}, PPO | {"critic.trunk": "shared"}, PPO], ids=["grpo", "shared", "own"])
def test_bfloat16_passes_move_float32_masters(settings, monkeypatch):
    case = Case(settings, dtype=torch.float32)
    exact = sharded(case)
    runner = half(case, monkeypatch)
    sequences = exact.engines.actor.sample_sequences(4, 8, seed=1)
    scores = [np.concatenate(each.engines.actor.score(sequences)) for each in (exact, runner)]
    assert 0.0 < np.abs(scores[0] - scores[1]).max() < 0.1
    before = weights_of(runner)
    ours, theirs = (each.step(groups_of(case, 0)).metrics for each in (runner, exact))
    assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=0.02)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    state = runner.state().engines.policy
    assert {tensor.dtype for tensor in state.weights.values()} == {torch.float32}
    assert {moments["exp_avg"].dtype for moments in state.optimizer.values()} == {torch.float32}
    assert all(not torch.equal(before[name], value) for name, value in weights_of(runner).items())


def test_weights_that_are_not_trained_are_held_as_they_are_computed_with(monkeypatch):
    runner = half(Case(LORA | {"algorithm.kl_coef": 0.05}, dtype=torch.float32), monkeypatch)
    actor = runner.engines.actor
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in actor.policy.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert {buffer.dtype for buffer in actor.policy.model.buffers()} == {torch.float32}  # rotary frequencies
    assert np.isfinite(runner.step(groups_of(CASES["lora"], 0)).metrics["kl_reference"])


@pytest.mark.numeric
def test_ranks_that_call_the_trunk_once_compute_what_others_do():
    """Of a model whose rows are not packed, ranks could have different numbers of calls, which are collectives."""
    case = CASES["not_packed"]
    ours, expected = sharded(case).engines.actor, runner_of(case).engines.actor
    calls = []
    ours.policy.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    from asyncrl.trainer.engines.base import Want

    rows = [plain_rows([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]])]
    want = Want(logprobs=True)
    (mine,), (theirs,) = ours.forward(rows, want, 1.0), expected.forward(rows, want, 1.0)
    assert len(calls) == 1
    torch.testing.assert_close(mine.logprobs, theirs.logprobs)

"""Packed rows against each sequence alone through the model as transformers has it, for several families."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.config import Config
from asyncrl.errors import ModelError
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines import packed_attention, trunk
from asyncrl.trainer.engines.device_rows import RowLayout, on_device
from asyncrl.trainer.engines.packed_attention import PACKED
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.engines.trunk import check_rotary, use_packed_rows
from asyncrl.trainer.packing import pack_groups
from asyncrl.trainer.step import StepRunner
from tests.trainer.tiny import make_group, make_rollout, random_groups

pytestmark = pytest.mark.numeric

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
WINDOWS = ("qwen2-window", "mistral", "gemma3")


def model_of(name: str):
    family, keys = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES, **keys)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


def policy_of(name: str) -> Policy:
    policy = Policy(model_of(name))
    assert policy.allows_shared_rows
    return policy


def groups_of_many_lengths():
    """Groups whose shared rows are short and long, with completions of one token, of equal and of other lengths."""
    rng = np.random.default_rng(5)
    groups = []
    shapes = [(9, [1, 4, 4, 6]), (60, [30, 30, 1, 45]), (3, [40]), (140, [1, 1]), (11, [12, 30])]
    for ordinal, (prompt, lengths) in enumerate(shapes):
        rollouts = [make_rollout(rng.integers(3, VOCAB, length)) for length in lengths]
        groups.append(make_group(ordinal, rng.integers(3, VOCAB, prompt), rollouts))
    return groups


LAYOUTS = {"plain": 0, "shared": 400}


def packed(policy: Policy, groups, shared_row_tokens: int, budget: int = 400):
    """(log-probs of each rollout, gradients) through packed micro-batches; the loss weighs every token differently.

    Without gradients where torch keeps none.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    found = [torch.empty(0)] * len(rollouts)
    for batch in pack_groups(groups, 0, budget, shared_row_tokens=shared_row_tokens):
        logprobs, entropies = policy.logprobs(batch.rows, 1.0)
        for sequence, index in enumerate(batch.rollout_index):
            own = torch.from_numpy(batch.sequence_index == sequence)
            if torch.is_grad_enabled():
                loss_of(logprobs[own], entropies[own], index).backward(retain_graph=True)
            found[index] = logprobs[own].detach()
    return found, [parameter.grad for parameter in policy.trainable_parameters()]


def loss_of(logprobs, entropies, index):
    weights = torch.cos(torch.arange(len(logprobs)) + float(index)).to(logprobs)
    return (weights * logprobs).sum() + 0.3 * (weights * entropies).sum()


def alone(name: str, groups):
    """The same, slowly: each sequence by itself through the untouched model and a full log-softmax."""
    model = model_of(name)
    found = []
    for group in groups:
        for rollout in group.rollouts:
            tokens = torch.from_numpy(np.concatenate([group.prompt_token_ids, rollout.token_ids]).astype(np.int64))
            first = len(group.prompt_token_ids) - 1
            log_p = torch.log_softmax(model(tokens[None], use_cache=False).logits[0, first:-1], dim=-1)
            logprobs = log_p.gather(1, tokens[first + 1 :, None])[:, 0]
            loss_of(logprobs, -(log_p.exp() * log_p).sum(-1), len(found)).backward()
            found.append(logprobs.detach())
    return found, [parameter.grad for parameter in model.parameters()]


def distances(expected, found) -> tuple[float, float]:
    """Largest difference of log-probs in nats; that of gradients, relative to the largest entry of each tensor."""
    gradients = [
        float((a - b).abs().max() / a.abs().max())
        for a, b in zip(expected[1], found[1], strict=True)
        if a.abs().max() > 0
    ]
    return off(expected[0], found[0]), max(gradients)


def off(expected, found) -> float:
    """Largest difference of log-probs in nats."""
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


@pytest.fixture(scope="module")
def expected():
    groups = groups_of_many_lengths()
    return {name: alone(name, groups) for name in FAMILIES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_equal_each_sequence_alone(name, layout, expected):
    found = packed(policy_of(name), groups_of_many_lengths(), LAYOUTS[layout])
    values, gradients = distances(expected[name], found)
    # Norms and rotary angles are float32 in transformers whatever the weights are.
    assert values < 1e-6
    assert gradients < 1e-5


def test_the_layouts_are_those_meant():
    groups = groups_of_many_lengths()
    plain = [on_device(batch.rows, torch.device("cpu")).layout for batch in pack_groups(groups, 0, 400)]
    shared = [
        on_device(batch.rows, torch.device("cpu")).layout
        for batch in pack_groups(groups, 0, 400, shared_row_tokens=400)
    ]
    assert any(run.count > 1 for layout in plain for run in layout.runs), "rows of one length attend at once"
    parts = [layout.parts for layout in shared if layout.segment_ids is not None]
    assert any(block.is_masked for blocks, _ in parts for block in blocks), "a short shared row"
    assert any(crosses for _, crosses in parts), "a long one"
    for layout in plain + shared:
        covered = np.concatenate([np.arange(b.start, b.start + b.count * b.length) for b in layout.parts[0]])
        assert sorted(covered) == list(range(sum(layout.lengths))), "each input is computed once"


def ignore_windows(patch):
    right = packed_attention.packed_attention
    wrong = lambda *args, sliding_window=None, **keys: right(*args, sliding_window=None, **keys)  # noqa: E731
    patch.setitem(packed_attention.AttentionInterface._global_mapping, PACKED, wrong)


def see_the_neighbour(patch):
    whole = lambda self: [dataclasses.replace(self.rows[0], length=sum(self.lengths))]  # noqa: E731
    patch.setattr(RowLayout, "runs", property(whole))


def count_on(patch):
    right = trunk.on_device

    def wrong(rows, device):
        rows = right(rows, device)
        positions = torch.arange(rows.num_inputs)
        return dataclasses.replace(rows, layout=dataclasses.replace(rows.layout, position_ids=positions))

    patch.setattr(trunk, "on_device", wrong)


def lose_the_prompt(patch):
    right = RowLayout.parts.func
    patch.setattr(RowLayout, "parts", property(lambda self: (right(self)[0], [])))


@pytest.mark.parametrize(
    ("break_it", "names", "layout"),
    [
        (ignore_windows, WINDOWS, "plain"),
        (ignore_windows, WINDOWS, "shared"),
        (see_the_neighbour, ("qwen3", "gemma3"), "plain"),
        (lose_the_prompt, ("llama",), "shared"),
        (count_on, ("qwen2",), "shared"),
    ],
)
def test_what_is_broken_is_seen_here_and_when_a_model_is_loaded(break_it, names, layout, monkeypatch, expected):
    groups = groups_of_many_lengths()
    for name in names:
        policy = policy_of(name)
        with monkeypatch.context() as patch, torch.no_grad():
            break_it(patch)
            assert off(expected[name][0], packed(policy, groups, LAYOUTS[layout])[0]) > 1e-3, name
            assert break_it is lose_the_prompt or not use_packed_rows(policy.model), "rows would be packed all the same"


@pytest.mark.parametrize("family", ["falcon", "stablelm"])
def test_a_model_that_cannot_pack_rows_computes_each_length_by_itself(family, caplog):
    keys = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"alibi": family == "falcon"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **keys)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    policy = Policy(model)
    assert not policy.allows_shared_rows
    assert "rows are not packed" in caplog.text
    runner = StepRunner(engines_for(policy, Config()), Config())
    assert runner.preparation.planner.shared_row_tokens == 0
    groups = random_groups(3, 3, vocab=VOCAB)
    scores = policy.score([[*g.prompt_token_ids, *r.token_ids] for g in groups for r in g.rollouts])
    for score, (group, rollout) in zip(scores, [(g, r) for g in groups for r in g.rollouts], strict=True):
        tokens = torch.tensor([[*group.prompt_token_ids.tolist(), *rollout.token_ids.tolist()]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens).logits[0, :-1], -1)
        assert np.abs(score - log_p.gather(1, tokens[0, 1:, None])[:, 0].numpy()).max() < 1e-5


def test_a_critic_with_a_trunk_of_its_own_takes_packed_rows():
    groups = groups_of_many_lengths()
    own = model_of("mistral").base_model
    critic = Critic(own, 32, dtype="float32", device=torch.device("cpu"))
    critic.double()
    torch.nn.init.ones_(critic.head.weight)
    assert own.config._attn_implementation == PACKED
    (batch,) = pack_groups(groups[-1:], 0, 400)
    values = critic.values(batch.rows)
    plain = model_of("mistral").base_model
    for sequence, index in enumerate(batch.rollout_index):
        rollout, prompt = groups[-1].rollouts[index], groups[-1].prompt_token_ids
        tokens = torch.from_numpy(np.concatenate([prompt, rollout.token_ids[:-1]]).astype(np.int64))[None]
        hidden = plain(tokens).last_hidden_state[0, len(prompt) - 1 :].detach()
        assert float((hidden.sum(-1) - values.detach()[batch.sequence_index == sequence]).abs().max()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_the_path_of_other_devices_computes_the_same(name, layout, monkeypatch, expected):
    policy = policy_of(name)
    right = packed_attention._row_by_row
    calls = []

    class Instead:
        @staticmethod
        def apply(*args):
            calls.append(1)
            return right(*args)

    monkeypatch.setattr(packed_attention, "_BlockAttention", Instead)
    values, gradients = distances(expected[name], packed(policy, groups_of_many_lengths(), LAYOUTS[layout]))
    assert calls
    assert values < 1e-6
    assert gradients < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rotary_angles_in_too_low_a_precision_are_refused(name):
    model = model_of(name).float()
    check_rotary(model, 32_768)
    rotary = model.model.rotary_emb
    right = type(rotary).forward

    # What a product with 10 bits of mantissa makes of a position, as TF32 has them.
    rotary.forward = lambda x, places, *args, **keys: right(rotary, x, places * (1 + 2**-11), *args, **keys)
    with pytest.raises(ModelError, match="position 4095"):
        check_rotary(model, 4096)

"""The policy: log-probs against the model's own logits, names, layouts, refusals."""

import json

import numpy as np
import pytest
import torch

from asyncrl.errors import ModelError, ShapeError
from asyncrl.trainer.engines.device_rows import on_device
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.packing import pack_groups
from tests.tolerances import assert_near, near
from tests.trainer.tiny import VOCAB, make_group, make_rollout, random_groups, save_tiny_model, tiny_model, tiny_policy

pytestmark = pytest.mark.numeric


def own_logprobs(model, tokens, temperature=1.0):
    """The slow, obvious reference: one sequence, the model's own logits, no padding, float64 log-softmax."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double() / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    return [log_p[t, token].item() for t, token in enumerate(tokens[1:])]


def packed_logprobs(policy, groups, temperature=1.0, **kwargs):
    """(context, token) -> log-prob for every completion token, through the micro-batches."""
    out = {}
    for batch in pack_groups(groups, 0, kwargs.pop("budget", 64), **kwargs):
        with torch.no_grad():
            logprobs, entropies = policy.logprobs(batch.rows, temperature)
        assert (entropies >= 0).all()
        starts = np.cumsum([0, *batch.rows.lengths])
        for place, token, value in zip(batch.rows.predictor, batch.rows.token_ids, logprobs.tolist(), strict=True):
            seen = slice(starts[np.searchsorted(starts, place, side="right") - 1], place + 1)
            context = batch.rows.input_ids[seen]
            if batch.rows.segment_ids is not None:
                segments = batch.rows.segment_ids[seen]
                context = context[(segments == 0) | (segments == segments[-1])]
            out[(*context.tolist(), int(token))] = value
    return out


@pytest.mark.parametrize("shared_row_tokens", [0, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_log_probs_equal_those_of_each_sequence_alone(shared_row_tokens, temperature):
    policy = tiny_policy()
    groups = random_groups(4, 3)
    packed = packed_logprobs(policy, groups, temperature, shared_row_tokens=shared_row_tokens)
    for group in groups:
        prompt = group.prompt_token_ids.tolist()
        for rollout in group.rollouts:
            tokens = [*prompt, *rollout.token_ids.tolist()]
            expected = own_logprobs(policy.model, tokens, temperature)[len(prompt) - 1 :]
            for t, value in enumerate(expected):
                assert packed[tuple(tokens[: len(prompt) + t + 1])] == near(value, max(map(abs, expected)))


def test_gradients_do_not_depend_on_the_layout():
    groups = random_groups(3, 4, prompt=(6, 8), completion=(1, 4))
    weights = torch.arange(4.0).repeat(3)
    gradients = []
    for shared in (0, 64):
        policy = tiny_policy()
        batches = pack_groups(groups, 0, 80, shared_row_tokens=shared)
        assert (batches[0].rows.segment_ids is None) == (shared == 0)
        for batch in batches:
            logprobs, entropies = policy.logprobs(batch.rows, 1.0)
            (weights[batch.rollout_index][batch.sequence_index] * logprobs + entropies).sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable_parameters()])
    for plain, shared in zip(*gradients, strict=True):
        assert_near(plain, shared)


def test_score_gives_each_sequence_its_own_log_probs():
    policy = tiny_policy()
    sequences = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    scores = policy.score(sequences)
    assert [score.dtype for score in scores] == [np.float32] * 3
    for tokens, score in zip(sequences, scores, strict=True):
        assert_near(score, own_logprobs(policy.model, tokens))
    assert policy.score([]) == []
    with pytest.raises(ShapeError, match="at least 2 tokens"):
        policy.score([[1, 2], [3]])


def test_a_tied_head_is_synchronised_under_its_own_name_and_trained_once():
    policy = tiny_policy(tied=True)
    named = dict(policy.named_sync_parameters())
    assert named["lm_head.weight"].data_ptr() == named["model.embed_tokens.weight"].data_ptr()
    assert len(policy.trainable_parameters()) == len(named) - 1


@pytest.mark.parametrize("tied", [True, False])
def test_sync_names_are_those_of_the_checkpoint_and_follow_training_in_place(tmp_path, tied):
    from safetensors import safe_open

    folder = save_tiny_model(tmp_path / "model", tied=tied)
    policy = Policy.load(str(folder))
    named = policy.named_sync_parameters()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) | {"lm_head.weight"} == {name for name, _ in named}
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, policy.model.state_dict()[name]) for name, tensor in named)


def test_weights_stored_in_bfloat16_become_float32_masters(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    policy = Policy.load(str(tmp_path))
    assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}


def test_bfloat16_computes_close_to_float32_and_keeps_float32_log_probs():
    exact, half = tiny_policy(), tiny_policy()
    half.autocast = "bfloat16"
    tokens = [list(range(12))]
    assert_near(half.score(tokens)[0], exact.score(tokens)[0], torch.bfloat16, steps=4)
    assert half.score(tokens)[0].dtype == np.float32
    assert not np.array_equal(half.score(tokens)[0], exact.score(tokens)[0])


def test_the_initial_policy_is_a_frozen_copy():
    policy = tiny_policy()
    reference = policy.initial_policy()
    assert reference.trainable_parameters() == []
    before = reference.score([[1, 2, 3]])[0]
    with torch.no_grad():
        policy.head_weight.mul_(0.5)
    np.testing.assert_array_equal(reference.score([[1, 2, 3]])[0], before)
    assert not np.allclose(policy.score([[1, 2, 3]])[0], before)


def test_a_folder_that_lacks_weights_is_refused_instead_of_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights, model.norm.weight"):
        Policy.load(str(folder))


def test_a_missing_folder_and_a_damaged_file_are_model_errors(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        Policy.load(str(tmp_path / "nowhere"))
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelError, match="cannot be loaded|is not a safetensors file"):
        Policy.load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(ModelError, match="cannot be loaded|is not a safetensors file"):
        Policy.load(str(folder))


def test_a_model_that_scales_its_logits_is_refused():
    from transformers import AutoModelForCausalLM, CohereConfig

    config = CohereConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, logit_scale=0.25, initializer_range=0.5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="caps or scales its logits"):
        Policy(AutoModelForCausalLM.from_config(config))


def test_nan_weights_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="broken"):
        Policy(model)


def test_the_architecture_digest_ignores_weights_and_notices_sizes():
    assert tiny_policy(seed=0).architecture == tiny_policy(seed=1).architecture
    assert tiny_policy().architecture != tiny_policy(layers=1).architecture


def test_the_mask_of_a_shared_row_by_hand():
    group = make_group(0, [1], [make_rollout([2, 3]), make_rollout([4, 5])])
    (batch,) = pack_groups([group], 0, 8, shared_row_tokens=8)
    layout = on_device(batch.rows, torch.device("cpu")).layout
    (block,) = layout.rows
    assert layout.mask(block, None).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert layout.mask(block, 1).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_one_token_prompts_and_completions_work():
    policy = tiny_policy()
    group = make_group(0, [3], [make_rollout([5])])
    assert packed_logprobs(policy, [group])[(3, 5)] == near(own_logprobs(policy.model, [3, 5])[0], 1.0)


def test_the_canary_sequences_are_likely_under_the_policy_and_repeatable():
    policy = tiny_policy()
    sequences = policy.sample_sequences(3, 12, seed=1)
    again = policy.sample_sequences(3, 12, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(sequences, again, strict=True))
    assert not np.array_equal(sequences[0], policy.sample_sequences(3, 12, seed=2)[0])
    assert all(len(s) == 12 and s.dtype == np.int32 and s.min() >= 0 and s.max() < policy.vocab_size for s in sequences)
    random = [np.random.default_rng(0).integers(0, policy.vocab_size, 12) for _ in range(3)]
    likely = np.mean([row.mean() for row in policy.score([s.tolist() for s in sequences])])
    unlikely = np.mean([row.mean() for row in policy.score([s.tolist() for s in random])])
    assert likely > unlikely

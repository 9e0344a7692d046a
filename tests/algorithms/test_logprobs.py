"""Chunked log-probs against a plain log_softmax in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms import logprobs as module
from asyncrl.algorithms.logprobs import chunked_logprobs, require_finite
from asyncrl.errors import NonFiniteError, ShapeError
from tests.tolerances import assert_near

pytestmark = pytest.mark.numeric


def plain(hidden, weight, tokens, temperature=1.0):
    """The slow, obvious reference: all logits at once."""
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, tokens[:, None]).squeeze(1), entropy


def inputs(rows=5, width=3, vocab=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


def test_three_tokens_by_hand():
    # Hidden (1), head (0, ln 2, ln 5): probabilities 1/8, 2/8, 5/8 for every row.
    hidden = torch.ones(3, 1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    logprobs, entropies = chunked_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    torch.testing.assert_close(logprobs, p.log())
    torch.testing.assert_close(entropies, (-(p * p.log()).sum()).expand(3))


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_values_and_gradients_equal_the_plain_formula_for_any_chunk(chunk_rows, temperature):
    hidden, weight, tokens = inputs()
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    results = []
    for function in (
        lambda: chunked_logprobs(hidden, weight, tokens, temperature=temperature, chunk_rows=chunk_rows),
        lambda: plain(hidden, weight, tokens, temperature),
    ):
        logprobs, entropies = function()
        gradients = torch.autograd.grad((weights * logprobs + entropies.square()).sum(), (hidden, weight))
        results.append((logprobs, entropies, *gradients))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_gradcheck_in_float64():
    hidden, weight, tokens = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_logprobs(h, w, tokens, temperature=1.3, chunk_rows=2), (hidden, weight)
    )


def test_unused_outputs_and_frozen_inputs_cost_no_gradient():
    hidden, weight, tokens = inputs()
    logprobs, _ = chunked_logprobs(hidden, weight.detach(), tokens)
    (gradient,) = torch.autograd.grad(logprobs.sum(), (hidden,))
    expected = torch.autograd.grad(plain(hidden, weight, tokens)[0].sum(), (hidden,))[0]
    torch.testing.assert_close(gradient, expected)
    _, entropies = chunked_logprobs(hidden, weight, tokens)
    (gradient,) = torch.autograd.grad(entropies.sum(), (weight,))
    expected = torch.autograd.grad(plain(hidden, weight, tokens)[1].sum(), (weight,))[0]
    torch.testing.assert_close(gradient, expected)


def test_bfloat16_hidden_states_give_a_float32_log_softmax():
    hidden, weight, tokens = inputs(dtype=torch.float32)
    half = hidden.detach().bfloat16()
    logprobs, entropies = chunked_logprobs(half, weight, tokens)
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected, _ = plain(half.float(), weight, tokens)
    torch.testing.assert_close(logprobs, expected)


def test_autocast_outside_does_not_reach_the_head():
    hidden, weight, tokens = inputs(dtype=torch.float32, width=64)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = chunked_logprobs(hidden, weight, tokens)
    assert_near(logprobs, plain(hidden, weight, tokens)[0])


def test_logits_far_apart_give_zero_entropy_and_no_nan():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [400.0], [-400.0]])
    logprobs, entropies = chunked_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == 0.0
    assert entropies.item() == 0.0
    (gradient,) = torch.autograd.grad((logprobs + entropies).sum(), hidden)
    assert torch.isfinite(gradient).all()


def test_no_rows_give_no_values_and_a_graph():
    hidden, weight, tokens = inputs(rows=0)
    logprobs, entropies = chunked_logprobs(hidden, weight, tokens)
    assert logprobs.shape == entropies.shape == (0,)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert not gradient.any()


def test_nan_stays_nan_and_is_named_by_require_finite():
    hidden, weight, tokens = inputs()
    hidden = hidden.detach().clone()
    hidden[1, 0] = torch.nan
    logprobs, _ = chunked_logprobs(hidden, weight, tokens)
    assert torch.isnan(logprobs[1])
    with pytest.raises(NonFiniteError, match="1 of 5 values of log-probs"):
        require_finite(logprobs, "log-probs")


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, tokens = inputs()
    with pytest.raises(ShapeError, match="weight"):
        chunked_logprobs(hidden, weight[:, :2], tokens)
    with pytest.raises(ValueError, match="token_ids"):
        chunked_logprobs(hidden, weight, tokens[:3])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), vocab=st.integers(1, 9), chunk=st.integers(1, 13), seed=st.integers(0, 999))
def test_probabilities_of_all_tokens_sum_to_one(rows, vocab, chunk, seed):
    hidden, weight, _ = inputs(rows=rows, vocab=vocab, seed=seed)
    total = sum(
        chunked_logprobs(hidden, weight, torch.full((rows,), token), chunk_rows=chunk)[0].exp()
        for token in range(vocab)
    )
    torch.testing.assert_close(total, torch.ones(rows, dtype=torch.float64))


def test_no_more_than_one_chunk_of_logits_is_made_at_once(monkeypatch):
    seen = []
    real = module._Head.logits

    def watched(self, hidden, weight):
        seen.append(hidden.shape[0] * weight.shape[0])
        return real(self, hidden, weight)

    monkeypatch.setattr(module._Head, "logits", watched)
    hidden, weight, tokens = inputs(rows=50)
    values, _ = chunked_logprobs(hidden, weight, tokens, chunk_rows=8)
    values.sum().backward()
    assert len(seen) == 2 * 7  # each chunk in the forward pass, and again in the backward pass
    assert max(seen) == 8 * 7


def test_chunks_are_cut_by_bytes_but_not_below_what_pays():
    wide, narrow = torch.empty(1, 1).expand(10**6, 1), torch.empty(512, 1)
    assert module._chunk_rows(wide) == module.MIN_CHUNK_ROWS
    assert module._chunk_rows(narrow) * 512 * 4 == module._chunk_rows(narrow.double()) * 512 * 8
    assert module._chunk_rows(narrow) * 512 * 4 == module.CHUNK_BYTES["cpu"]


def test_entropies_are_left_out_where_they_are_not_wanted():
    hidden, weight, tokens = inputs()
    expected, _ = chunked_logprobs(hidden, weight, tokens)
    logprobs, entropies = chunked_logprobs(hidden, weight, tokens, entropies=False)
    assert entropies is None
    assert torch.equal(logprobs, expected)
    gradients = [torch.autograd.grad(values.cos().sum(), (hidden, weight)) for values in (expected, logprobs)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_rounds_the_operands_and_nothing_else(dtype):
    """Against float64 on the rounded values: logits in half precision would be 1e-2 away."""
    hidden, weight, tokens = inputs(rows=40, width=64, vocab=50, dtype=torch.float32)
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (hidden, weight)]
    expected = plain(*rounded, tokens, 0.7)
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    found = chunked_logprobs(*given, tokens, temperature=0.7, products=torch.bfloat16, chunk_rows=16)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad((values.cos() + entropies).sum(), operands)
        for (values, entropies), operands in ((found, given), (expected, rounded))
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8  # the gradient of a bfloat16 tensor is bfloat16
    for ours, reference in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - reference).abs().max() / reference.abs().max()) < tolerance


def test_the_gradient_of_the_weight_adds_up_over_many_chunks():
    hidden, weight, tokens = inputs(rows=600, dtype=torch.float32)
    values, _ = chunked_logprobs(hidden, weight, tokens, chunk_rows=2)
    (found,) = torch.autograd.grad(values.sum(), weight)
    (expected,) = torch.autograd.grad(plain(hidden.double(), weight.double(), tokens)[0].sum(), weight)
    assert_near(found, expected.float())

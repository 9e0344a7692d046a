"""Log-probs and entropies of chosen tokens straight from hidden states, without the full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyncrl.errors import NonFiniteError, ShapeError

# The rows of one chunk hold about this many logits; 2**24 in float32 are 64 MiB, and two such buffers live at once.
CHUNK_LOGITS = 2**24
MIN_CHUNK_ROWS = 256


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy, in nats, of softmax(hidden @ weight.T / temperature) for one chosen token per row.

    hidden       [N, H] final hidden states; carries the gradient
    weight       [V, H] the language-model head; carries the gradient. Matrix products run in its dtype
    token_ids    [N] int64, the tokens whose log-probs are wanted
    temperature  above 0; logits z are divided by it
    chunk_rows   rows of logits alive at once; None derives it from V

    Memory is two chunks of logits in each direction, whatever N is: the backward pass computes the logits of a chunk
    again and, with p = softmax(z / temperature) and H its entropy,

        d logprob / dz = (onehot - p) / temperature        dH / dz = -p (log p + H) / temperature

    Returns (logprobs [N], entropies [N]), float32 (float64 for float64 weights): the log-softmax never runs in half
    precision. Raises ShapeError when shapes do not belong together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"hidden must be [N, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if token_ids.shape != hidden.shape[:1]:
        raise ShapeError(f"token_ids must be [N] = [{hidden.shape[0]}]; got {tuple(token_ids.shape)}")
    assert temperature > 0.0, temperature
    rows = chunk_rows or max(MIN_CHUNK_ROWS, CHUNK_LOGITS // weight.shape[0])
    # The head keeps the dtype of its weight: under autocast the products would silently run in half precision.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        outputs: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]  # torch's `apply`
            hidden.to(weight.dtype), weight, token_ids, 1.0 / temperature, rows
        )
    return outputs


def require_finite(values: Tensor, what: str) -> None:
    """Raises NonFiniteError, which names `what` and how many, unless every value is finite. Waits for the device."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {values.numel()} values of {what} are NaN or infinite")


def _scaled_logits(hidden: Tensor, weight: Tensor, inverse_temperature: float) -> Tensor:
    logits = hidden @ weight.t()
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits.mul_(inverse_temperature) if inverse_temperature != 1.0 else logits


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        inverse_temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            log_p = torch.log_softmax(_scaled_logits(hidden[rows], weight, inverse_temperature), dim=-1)
            logprobs[rows] = log_p.gather(1, token_ids[rows, None]).squeeze(1)
            # p log p is 0 where p underflows to 0; exp(-inf) * -inf would be NaN there.
            entropies[rows] = -(log_p.exp() * log_p.clamp_min(torch.finfo(dtype).min)).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, token_ids, entropies)
        ctx.inverse_temperature, ctx.chunk_rows = inverse_temperature, chunk_rows
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, entropies = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        # Chunks add up in the accumulation dtype: bfloat16 sums over many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=entropies.dtype) if want_weight else None
        if grad_logprobs is None and grad_entropies is None:
            return None, None, None, None, None
        for start in range(0, hidden.shape[0], ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            log_p = torch.log_softmax(_scaled_logits(hidden[rows], weight, ctx.inverse_temperature), dim=-1)
            grad_logits = _grad_logits(
                log_p,
                token_ids[rows],
                entropies[rows],
                None if grad_logprobs is None else grad_logprobs[rows],
                None if grad_entropies is None else grad_entropies[rows],
            )
            grad_logits = grad_logits.mul_(ctx.inverse_temperature).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _grad_logits(
    log_p: Tensor,
    token_ids: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
) -> Tensor:
    """Gradient towards the scaled logits of one chunk [n, V]; overwrites log_p."""
    p = log_p.exp()
    if grad_entropies is None:
        assert grad_logprobs is not None
        grad = p.mul_(-grad_logprobs[:, None])
    else:
        log_p = log_p.clamp_min_(torch.finfo(log_p.dtype).min)
        scale = log_p.add_(entropies[:, None]).mul_(-grad_entropies[:, None])
        if grad_logprobs is not None:
            scale = scale.sub_(grad_logprobs[:, None])
        grad = p.mul_(scale)
    if grad_logprobs is not None:
        grad.scatter_add_(1, token_ids[:, None], grad_logprobs[:, None])
    return grad

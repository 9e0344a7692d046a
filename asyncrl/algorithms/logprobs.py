"""Log-probs and entropies of chosen tokens straight from hidden states, without the full logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asyncrl.errors import NonFiniteError, ShapeError

# Bytes of the logits of one chunk. On a CPU they should stay in its caches between the passes over them, on a GPU they
# should make its products large. A chunk of few rows would move the head's weights, and their gradient, for little.
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**30}
MIN_CHUNK_ROWS = 128


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    entropies: bool = True,
    products: torch.dtype | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy, in nats, of softmax(hidden @ weight.T / temperature) for one chosen token per row.

    hidden       [N, H] final hidden states; carries the gradient
    weight       [V, H] the language-model head; carries the gradient
    token_ids    [N] int64, the tokens whose log-probs are wanted
    temperature  above 0; logits z are divided by it
    entropies    False: none are computed, and None is returned in their place
    products     dtype to which the operands of matrix products are rounded; None = that of the weight. Their results
                 are float32 (float64 for float64 weights), and so are softmax and sums: logits are never rounded
    chunk_rows   rows of logits alive at once; None derives it from V

    Memory is two chunks of logits in each direction, whatever N is: the backward pass computes the logits of a chunk
    again and, with p = softmax(z / temperature) and H its entropy,

        d logprob / dz = (onehot - p) / temperature        dH / dz = -p (log p + H) / temperature

    Returns (logprobs [N], entropies [N]), float32 (float64 for float64 weights). Raises ShapeError when shapes do not
    belong together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"hidden must be [N, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if token_ids.shape != hidden.shape[:1]:
        raise ShapeError(f"token_ids must be [N] = [{hidden.shape[0]}]; got {tuple(token_ids.shape)}")
    assert temperature > 0.0, temperature
    head = _Head(
        products=products or weight.dtype,
        inverse_temperature=1.0 / temperature,
        chunk_rows=chunk_rows or _chunk_rows(weight),
        entropies=entropies,
    )
    # The head keeps its dtypes: under autocast the products would silently run in half precision.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        outputs: tuple[Tensor, Tensor | None] = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]  # torch's `apply`
            hidden, weight, token_ids, head
        )
    return outputs


def _chunk_rows(weight: Tensor) -> int:
    row_bytes = weight.shape[0] * (8 if weight.dtype == torch.float64 else 4)
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"]) // row_bytes)


def require_finite(values: Tensor, what: str) -> None:
    """Raises NonFiniteError, which names `what` and how many, unless every value is finite. Waits for the device."""
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {values.numel()} values of {what} are NaN or infinite")


@dataclass(frozen=True, slots=True)
class _Head:
    """How log-probs are computed; see `chunked_logprobs`."""

    products: torch.dtype
    inverse_temperature: float
    chunk_rows: int
    entropies: bool

    def operand(self, tensor: Tensor) -> Tensor:
        """The tensor as an operand of products, rounded to their dtype.

        Only CUDA multiplies half precision into float32; elsewhere the rounded values are multiplied as float32.
        """
        rounded = tensor.to(self.products)
        is_half = rounded.dtype in (torch.bfloat16, torch.float16)
        return rounded.float() if is_half and not tensor.is_cuda else rounded

    def chunks(self, count: int) -> list[slice]:
        """Slices of at most `chunk_rows` rows."""
        return [slice(start, min(count, start + self.chunk_rows)) for start in range(0, count, self.chunk_rows)]

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Scaled logits of operands [n, H] and [V, H]."""
        logits = _product(hidden, weight.t())
        return logits.mul_(self.inverse_temperature) if self.inverse_temperature != 1.0 else logits


def _product(left: Tensor, right: Tensor, add_to: Tensor | None = None) -> Tensor:
    """left @ right in float32 (float64 for float64 operands), added to `add_to` in place where that is given."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right if add_to is None else add_to.addmm_(left, right)
    # On CUDA alone; not yet run on a GPU.
    if add_to is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(add_to, left, right, out_dtype=torch.float32, out=add_to)


_log_softmax_out = torch.ops.aten._log_softmax.out


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logprobs) if head.entropies else None
        operand = head.operand(weight)
        for rows in head.chunks(hidden.shape[0]):
            log_p = head.logits(head.operand(hidden[rows]), operand)
            _log_softmax_out(log_p, -1, False, out=log_p)
            logprobs[rows] = log_p.gather(1, token_ids[rows, None]).squeeze(1)
            if entropies is not None:
                p = log_p.exp()
                torch.sum(p.mul_(log_p), dim=-1, out=entropies[rows]).neg_()
        ctx.save_for_backward(hidden, weight, token_ids, entropies)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, entropies = ctx.saved_tensors
        head: _Head = ctx.head
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        if grad_logprobs is None and grad_entropies is None:
            return None, None, None, None
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if want_hidden else None
        # Chunks add up in the accumulation dtype: bfloat16 sums over many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        operand = head.operand(weight)
        for rows in head.chunks(hidden.shape[0]):
            chunk = head.operand(hidden[rows])
            grad_logits = _grad_logits(
                head.logits(chunk, operand),
                token_ids[rows],
                entropies[rows] if grad_entropies is not None else None,
                None if grad_logprobs is None else grad_logprobs[rows],
                None if grad_entropies is None else grad_entropies[rows],
            )
            if head.inverse_temperature != 1.0:
                grad_logits.mul_(head.inverse_temperature)
            grad_logits = grad_logits.to(operand.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _product(grad_logits, operand)
            if grad_weight is not None:
                _product(grad_logits.t(), chunk, add_to=grad_weight)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _grad_logits(
    logits: Tensor,
    token_ids: Tensor,
    entropies: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
) -> Tensor:
    """Gradient towards the scaled logits of one chunk [n, V]; overwrites them."""
    if grad_entropies is None:
        assert grad_logprobs is not None
        grad = torch.softmax(logits, dim=-1, out=logits).mul_(-grad_logprobs[:, None])
    else:
        assert entropies is not None
        log_p = _log_softmax_out(logits, -1, False, out=logits)
        p = log_p.exp()
        scale = log_p.add_(entropies[:, None]).mul_(-grad_entropies[:, None])
        if grad_logprobs is not None:
            scale = scale.sub_(grad_logprobs[:, None])
        grad = p.mul_(scale)
    if grad_logprobs is not None:
        grad.scatter_add_(1, token_ids[:, None], grad_logprobs[:, None])
    return grad

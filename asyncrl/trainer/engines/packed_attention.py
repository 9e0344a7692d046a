"""Attention within packed rows, as a function that transformers calls in place of its own.

A model whose attention implementation is `PACKED` takes `row_layout` as an argument of its forward pass and hands it
to this function in every layer; without it, the model computes what it does under "sdpa".

    CPU                     blocks of one length by the flash kernel of SDPA, no input padded; see `device_rows`
    CUDA, half precision    `torch.nn.attention.varlen.varlen_attn`
    anything else           row by row through SDPA, which is right everywhere
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from asyncrl.trainer.engines.device_rows import Block, RowLayout
from asyncrl.trainer.engines.sequence_parallel import attend_in_parallel

PACKED = "asyncrl_packed"

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_layout: RowLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Each token of a row sees what stands before it in that row; see `RowLayout`.

    query           [1, Hq, T, D]; key, value [1, Hkv, T, D], where Hkv divides Hq. The dropout of `others` is ignored.
                    With a `sequence_group` these are this rank's slice of the T inputs, and so is what is returned
    attention_mask  ignored where there is a layout
    sliding_window  a token sees itself and the `sliding_window - 1` positions before it; None = all of them

    Returns ([1, T, Hq, D], None).
    """
    if row_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **others
        )
    if any(others.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise ValueError("packed rows know no bias, cap or sink of attention scores")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < row_layout.longest else None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in _of_one_dtype(query, key, value))  # [T, heads, D]
    attend = functools.partial(_attend, layout=row_layout, scale=scale, window=window)
    if row_layout.sequence_group is None:
        output = attend(q, k, v)
    else:
        output = attend_in_parallel(q, k, v, attend, sum(row_layout.lengths), row_layout.sequence_group)
    return output[None], None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float, window: int | None) -> Tensor:
    if q.device.type == "cpu":
        output: Tensor = _BlockAttention.apply(q, k, v, layout, scale, window)  # type: ignore[no-untyped-call]
        return output
    if q.is_cuda and q.dtype != torch.float32 and layout.segment_ids is None and q.shape[-1] <= 256:
        return _varlen_attention(q, k, v, layout, scale, window)
    return _row_by_row(q, k, v, layout, scale, window)


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors as SDPA would take them: under autocast in its dtype."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return [tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor for tensor in tensors]


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float, window: int | None) -> Tensor:
    """Flash attention over rows of any lengths; not yet run on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1  # keys to the left of a token; its own is not counted
    output = varlen_attn(
        q, k, v, layout.starts, layout.starts, layout.longest, layout.longest,
        scale=scale, window_size=(left, 0), enable_gqa=True,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float, window: int | None) -> Tensor:
    outputs = []
    parts = [tensor.split(layout.lengths) for tensor in (q, k, v)]
    for block, query, key, value in zip(layout.rows, *parts, strict=True):
        mask = layout.mask(block, window) if _needs_mask(block, window) else None
        heads_first = [part.transpose(0, 1)[None] for part in (query, key, value)]
        output = scaled_dot_product_attention(
            heads_first[0], heads_first[1], heads_first[2],
            attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
        )  # fmt: skip
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _needs_mask(block: Block, window: int | None) -> bool:
    return block.is_masked or (window is not None and window < block.length)


class _BlockAttention(torch.autograd.Function):
    """Attention of q [T, Hq, D] to k, v [T, Hkv, D] on a CPU, block by block; [T, Hq, D].

    An input that is in a block and in a cross has one softmax over both: outputs o1, o2 with log-sum-exps l1, l2 make
    l = log(e^l1 + e^l2) and o = o1 e^(l1 - l) + o2 e^(l2 - l). The kernel's backward pass takes probabilities as
    e^(score - l) and needs nothing else of the other part than o and l, so each part is given those.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, scale: float, window: int | None
    ) -> Tensor:
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[:2], dtype=wide)
        blocks, crosses = _parts(layout, window)
        for block in blocks:
            part, part_lse = _flash_cpu(
                *(_sequences(tensor, block) for tensor in (q, k, v)),
                0.0,
                **_visibility(layout, block, window, q.dtype),
                scale=scale,
            )
            _sequences(output, block).copy_(part)
            _sequences(lse, block).copy_(part_lse)
        for cross in crosses:
            own = Block(cross.start, 1, cross.length)
            prompt = Block(cross.prompt_start, 1, cross.prompt_length)
            part, part_lse = _flash_cpu(
                _sequences(q, own), _sequences(k, prompt), _sequences(v, prompt), 0.0, False, scale=scale
            )
            so_far, lse_so_far = _sequences(output, own), _sequences(lse, own)
            both = torch.logaddexp(lse_so_far, part_lse)
            merged = so_far * (lse_so_far - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
            so_far.copy_(merged)
            lse_so_far.copy_(both)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.arguments = (layout, scale, window)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        layout, scale, window = ctx.arguments
        grad = grad.contiguous()
        grads = [torch.empty_like(whole, memory_format=torch.contiguous_format) for whole in (q, k, v)]
        blocks, crosses = _parts(layout, window)
        for block in blocks:
            parts = _flash_cpu_backward(
                *(_sequences(tensor, block) for tensor in (grad, q, k, v, output, lse)), 0.0,
                **_visibility(layout, block, window, q.dtype), scale=scale,
            )  # fmt: skip
            for whole, part in zip(grads, parts, strict=True):
                _sequences(whole, block).copy_(part)
        for cross in crosses:
            own = Block(cross.start, 1, cross.length)
            prompt = Block(cross.prompt_start, 1, cross.prompt_length)
            parts = _flash_cpu_backward(
                _sequences(grad, own), _sequences(q, own), _sequences(k, prompt), _sequences(v, prompt),
                _sequences(output, own), _sequences(lse, own), 0.0, False, scale=scale,
            )  # fmt: skip
            for whole, block, part in zip(grads, (own, prompt, prompt), parts, strict=True):
                _sequences(whole, block).add_(part)
        return *grads, None, None, None


def _parts(layout: RowLayout, window: int | None) -> tuple[list[Block], list[Any]]:
    """The layout's blocks and crosses; behind a window whole rows, because a cross knows no mask."""
    if window is not None and layout.pieces is not None:
        return layout.rows, []
    if window is not None:
        return [block for run in layout.runs for block in _singly(run, window)], []
    return layout.parts


def _singly(run: Block, window: int) -> list[Block]:
    """The rows of a run, one by one if a mask is needed, which is made for one row."""
    if run.length <= window:
        return [run]
    return [Block(run.start + index * run.length, 1, run.length) for index in range(run.count)]


def _sequences(tensor: Tensor, block: Block) -> Tensor:
    """A block of tensor [T, heads, ...] as a view [count, heads, length, ...]."""
    part = tensor[block.start : block.start + block.count * block.length]
    return part.view(block.count, block.length, *part.shape[1:]).transpose(1, 2)


def _visibility(layout: RowLayout, block: Block, window: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """`is_causal` and `attn_mask` of the kernel; a mask is added to the scores."""
    if not _needs_mask(block, window):
        return {"is_causal": True}
    mask = layout.mask(block, window)
    scores = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return {"is_causal": False, "attn_mask": scores[None, None]}

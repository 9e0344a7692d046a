"""Rows on the device of a model, and how their attention is cut into kernel calls. Made once, used by every pass.

Within a row a token sees what stands before it; in a shared row, the prompt and its own completion only. A CPU kernel
takes sequences of one length at a time, so rows (and completions) of one length that are neighbours make one *block*:

    plain rows     a block for each run of rows of one length, causal
    shared row     a block for the prompt and for each run of completions of one length, causal; and one *cross*, in
                   which all completions look at the whole prompt. What a completion's token sees is split over two
                   softmaxes, which are merged by their log-sum-exp
    short shared   one block with a mask: fewer calls, and the work that the mask throws away is small
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.trainer.packing import Rows

# Shared rows of up to this many inputs take a mask. Measured on one core, 8 heads of 32, forward and backward: 32 rows
# of 12 + 8 x 5 inputs 8 ms with a mask and 19 ms without; 16 rows of 30 + 8 x 63 inputs 275 ms and 116 ms.
MASKED_ROW_INPUTS = 128


@dataclass(frozen=True, slots=True)
class Block:
    """`count` sequences of `length` inputs, one after the other from input `start`, each of which sees itself."""

    start: int
    count: int
    length: int
    is_masked: bool = False  # a short shared row: causal is not enough


@dataclass(frozen=True, slots=True)
class Cross:
    """Inputs of completions that see a whole prompt: `length` of them from `start`."""

    start: int
    length: int
    prompt_start: int
    prompt_length: int


@dataclass(frozen=True)
class RowLayout:
    """Which of T inputs make a row, for an attention function."""

    lengths: tuple[int, ...]  # inputs of each row
    position_ids: Tensor  # int64 [T]
    segment_ids: Tensor | None  # int64 [T] in shared rows
    starts: Tensor  # int32 [B + 1], first input of each row, and T
    pieces: tuple[tuple[int, ...], ...] | None = None  # of each shared row: inputs of the prompt, of each completion
    sequence_group: Any = None  # the ranks that share these rows, each of which computes a slice of them
    own: slice = field(default_factory=lambda: slice(None))  # of the T inputs: that slice
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Inputs of the longest row."""
        return max(self.lengths)

    @cached_property
    def rows(self) -> list[Block]:
        """Each row as a block of its own; with a mask where it is shared."""
        starts = np.cumsum([0, *self.lengths])[:-1].tolist()
        return [
            Block(start, 1, length, self.segment_ids is not None)
            for start, length in zip(starts, self.lengths, strict=True)
        ]

    @cached_property
    def runs(self) -> list[Block]:
        """Neighbouring rows of one length as one block."""
        return list(_runs(0, self.lengths))

    @cached_property
    def parts(self) -> tuple[list[Block], list[Cross]]:
        """Blocks that hold each input once, and crosses."""
        if self.pieces is None:
            return self.runs, []
        blocks: list[Block] = []
        crosses: list[Cross] = []
        for row, (prompt, *completions) in zip(self.rows, self.pieces, strict=True):
            if row.length <= MASKED_ROW_INPUTS:
                blocks.append(row)
                continue
            blocks.append(Block(row.start, 1, prompt))
            after = row.start + prompt
            blocks += _runs(after, completions)
            if row.length > prompt:  # completions of one token have no inputs
                crosses.append(Cross(after, row.length - prompt, row.start, prompt))
        return blocks, crosses

    def mask(self, block: Block, window: int | None) -> Tensor:
        """Who sees whom in a block of one row: bool [L, L], True where the query (first axis) may look at the key.

        A token sees the prompt (segment 0) and its own segment, never the future, and only what is less than `window`
        positions away. Example: segments (0, 1, 2) -> ((1, 0, 0), (1, 1, 0), (1, 0, 1)).
        """
        key = (block.start, window or 0)
        if key in self._masks:
            return self._masks[key]
        inputs = slice(block.start, block.start + block.length)
        positions = self.position_ids[inputs]
        mask = torch.ones(block.length, block.length, dtype=torch.bool, device=positions.device).tril_()
        if self.segment_ids is not None:
            segments = self.segment_ids[inputs]
            mask &= (segments == 0) | (segments == segments[:, None])
        if window is not None:
            mask &= positions[:, None] - positions < window
        if block.length <= MASKED_ROW_INPUTS:  # the larger ones would take more memory than time
            self._masks[key] = mask
        return mask


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """`Rows` as tensors; what an engine computes from."""

    input_ids: Tensor  # int64 [T]
    predictor: Tensor  # int64 [N]
    token_ids: Tensor  # int64 [N]
    layout: RowLayout
    predictor_on_host: np.ndarray  # `predictor`, to be read without waiting for the device

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return len(self.token_ids)

    @property
    def num_inputs(self) -> int:
        """Tokens that the model computes."""
        return len(self.input_ids)


def on_device(rows: Rows | DeviceRows, device: torch.device) -> DeviceRows:
    """The rows on `device`; those that are there already as they are."""
    if isinstance(rows, DeviceRows):
        return rows
    starts = np.cumsum([0, *rows.lengths], dtype=np.int32)
    layout = RowLayout(
        lengths=tuple(rows.lengths.tolist()),
        position_ids=to_device(rows.position_ids, device),
        segment_ids=None if rows.segment_ids is None else to_device(rows.segment_ids, device),
        starts=to_device(starts, device),
        pieces=None if rows.segment_ids is None else _pieces(rows.segment_ids, starts),
    )
    return DeviceRows(
        input_ids=to_device(rows.input_ids, device),
        predictor=to_device(rows.predictor, device),
        token_ids=to_device(rows.token_ids, device),
        layout=layout,
        predictor_on_host=rows.predictor,
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on `device`. The copy to a GPU waits for nothing; not yet run on one."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # From memory that may be swapped out, a copy of more than 64 KiB waits for all that is queued on the GPU.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _pieces(segment_ids: np.ndarray, starts: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Inputs of each segment of each row; a completion of one token has none of its own."""
    rows = np.split(segment_ids, starts[1:-1])
    return tuple(tuple(np.bincount(row).tolist()) for row in rows)


def _runs(start: int, lengths: tuple[int, ...] | list[int]) -> Iterator[Block]:
    """Neighbours of one length as one block; those without inputs are left out."""
    begin = 0
    while begin < len(lengths):
        end = begin
        while end < len(lengths) and lengths[end] == lengths[begin]:
            end += 1
        if lengths[begin]:
            yield Block(start, end - begin, lengths[begin])
        start += (end - begin) * lengths[begin]
        begin = end

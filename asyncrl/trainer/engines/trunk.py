"""Hidden states of a transformer for packed rows, and whether it computes those rightly: asked of the model itself.

What a model does with its neighbours in a row cannot be read off its configuration: it may count places instead of
positions, see only the nearest tokens, or carry a state along. So rows are packed where a few tokens of each kind of
row come out as they do alone; elsewhere rows of one length are computed by themselves, which is slower, always right,
and pads nothing either.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.errors import ModelError
from asyncrl.trainer.engines.device_rows import DeviceRows, on_device
from asyncrl.trainer.engines.packed_attention import PACKED
from asyncrl.trainer.packing import Rows, doubled_rows, plain_rows

log = logging.getLogger(__name__)

# Keys with these words limit whom a token sees, unless they are unset. Of a sliding window the attention function is
# told by each layer; the other two are harmless.
LIMITING_WORDS = ("window", "chunk", "alibi", "local_attention", "attention_types", "block_size")
HARMLESS_WORDS = ("sliding_window", "max_window_layers", "chunk_size_feed_forward")
KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})

# Largest difference of a hidden state, packed against alone, relative to its norm. Rounding makes about 1e-6 and 0.02;
# a neighbour that is seen, or another distance, makes 0.1 and more.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
TEST_WINDOW = 4  # what windows are set to for the test, so that its few tokens reach beyond them
TEST_LENGTHS = (9, 2, 9, 6)


def use_packed_rows(model: PreTrainedModel, dtype: str = "float32") -> bool:
    """Has the model attend within packed rows if it computes them rightly, as `dtype` says; returns whether.

    Where rows are packed they may be shared, too: both are tried.
    """
    name = type(model).__name__
    if not has_known_attention(model.config):
        log.warning("%s: rows are not packed: its attention is of a kind that is not known", name)
        return False
    if is_packed(model):
        model.set_attn_implementation("sdpa")
    before = model.config._attn_implementation
    try:
        difference = _packed_difference(model, dtype)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        model.set_attn_implementation(before)
        log.warning("%s: rows are not packed: %s: %s", name, type(error).__name__, error)
        return False
    if difference <= TOLERANCES[dtype]:  # NaN fails too
        return True
    model.set_attn_implementation(before)
    log.warning("%s: rows are not packed: hidden states would be %.2g away, relatively", name, difference)
    return False


def is_packed(trunk: nn.Module) -> bool:
    """Whether a model attends within packed rows."""
    config: Any = trunk.config
    return bool(config._attn_implementation == PACKED)


def completion_hidden(
    trunk: nn.Module, rows: Rows | DeviceRows, device: torch.device, *, in_one_call: bool = False
) -> Tensor:
    """Final hidden states of a transformer at the places completion tokens are predicted from, [N, H].

    rows         plain ones where the trunk is not packed. Of a slice of rows (`OwnSlice`), N are its own tokens
    in_one_call  call the trunk once, whatever the rows are: for ranks that must all make as many calls. One that is not
                 packed computes padding then
    """
    rows = on_device(rows, device)
    if is_packed(trunk):
        # A mask of four axes is taken as it is: none is built, and nothing waits for the device.
        no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
        hidden: Tensor = trunk(
            input_ids=rows.input_ids[None],
            position_ids=rows.layout.position_ids[None, rows.layout.own],
            attention_mask=no_mask,
            row_layout=rows.layout,
            use_cache=False,
        ).last_hidden_state[0]
    else:
        assert rows.layout.segment_ids is None, "a model that is not packed has no shared rows"
        if in_one_call:
            return _padded_hidden(trunk, rows).index_select(0, rows.predictor)
        parts = []
        for run in rows.layout.runs:
            inputs = rows.input_ids[run.start : run.start + run.count * run.length].view(run.count, run.length)
            parts.append(trunk(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1))
        hidden = torch.cat(parts)
    return hidden.index_select(0, rows.predictor)


def _padded_hidden(trunk: nn.Module, rows: DeviceRows) -> Tensor:
    """Hidden states of all inputs [T, H] by one call: rows padded on the right, where causal attention never looks."""
    lengths = torch.tensor(rows.layout.lengths, device=rows.input_ids.device)
    inside = torch.arange(rows.layout.longest, device=lengths.device) < lengths[:, None]
    inputs = rows.input_ids.new_zeros(inside.shape)
    inputs[inside] = rows.input_ids
    hidden: Tensor = trunk(input_ids=inputs, use_cache=False).last_hidden_state
    return hidden[inside]


def compute_dtype(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass runs in: autocast for bfloat16, nothing for float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def has_known_attention(config: Any) -> bool:
    """Whether every layer attends in full or within a sliding window, as far as a configuration says."""
    if not set(getattr(config, "layer_types", None) or ["full_attention"]) <= KNOWN_LAYERS:
        return False
    values = config.to_dict()
    limits = [key for key in values if any(word in key for word in LIMITING_WORDS)]
    return not any(values[key] for key in limits if not any(word in key for word in HARMLESS_WORDS))


@torch.no_grad()
def check_rotary(model: nn.Module, max_length: int) -> None:
    """Compares rotary angles at the last of `max_length` positions, as the device computes them, with float64.

    A product of positions and frequencies in TF32 or bfloat16 makes angles wrong by radians at a few thousand
    positions, and nothing else tells. Modules that take other arguments than transformers' usual ones are passed over.

    Raises ModelError.
    """
    position = max_length - 1
    tolerance = 1e-3 + 2**-22 * position  # float32 rounds an angle to 2**-24 of itself
    for name, module in model.named_modules():
        for kind in ("", *sorted(KNOWN_LAYERS)):
            wrong = _rotary_error(module, kind, position)
            if wrong is not None and not wrong <= tolerance:  # NaN fails too
                raise ModelError(
                    f"{name}: the cosine of a rotary angle at position {position} is {wrong:.2g} away from that in "
                    f"float64, at most {tolerance:.2g} is allowed: this device computes positions in too low a "
                    "precision; set torch.backends.cuda.matmul.fp32_precision to 'ieee', or lower model.max_length"
                )


def _rotary_error(module: nn.Module, kind: str, position: int) -> float | None:
    """Largest error of a cosine at `position`; None where the module has no such angles, or none that are known.

    kind  of layer, where each kind has frequencies of its own; else empty
    """
    prefix = f"{kind}_" if kind else ""
    frequencies = getattr(module, f"{prefix}inv_freq", None)
    if not isinstance(frequencies, Tensor):
        return None
    arguments = {"layer_type": kind} if kind else {}
    places = torch.tensor([[0, position]], device=frequencies.device)
    try:
        cosines = module(torch.zeros(1, device=frequencies.device), places, **arguments)[0][0, -1].double().cpu()
    except (TypeError, ValueError, AttributeError, IndexError):
        return None
    # Asked for again: a dynamic scale may have changed them just now.
    exact = getattr(module, f"{prefix}inv_freq").double().cpu() * position
    expected = exact.cos() * getattr(module, f"{prefix}attention_scaling", 1.0)
    count = len(expected)
    if cosines.dim() != 1 or len(cosines) not in (count, 2 * count):
        return None
    layouts = [cosines[:count], cosines[:: len(cosines) // count]]  # halves one after the other, or pairs
    return min(float((found - expected).abs().max()) for found in layouts)


@torch.no_grad()
def _packed_difference(model: PreTrainedModel, dtype: str) -> float:
    """Sets the implementation; largest relative difference of its hidden states, packed against alone."""
    device = next(model.parameters()).device
    embedding: Any = model.get_input_embeddings()
    vocab_size = embedding.weight.shape[0]
    tokens = np.random.default_rng(0).integers(0, vocab_size, sum(TEST_LENGTHS))
    sequences = [part.tolist() for part in np.split(tokens, np.cumsum(TEST_LENGTHS)[:-1])]
    plain, doubled = plain_rows(sequences), doubled_rows(sequences)
    with _small_windows(model), compute_dtype(dtype, device):
        alone = torch.cat(
            [completion_hidden(model.base_model, plain_rows([sequence]), device) for sequence in sequences]
        )
        model.set_attn_implementation(PACKED)
        if not is_packed(model.base_model):
            raise ValueError("its attention cannot be replaced")
        packed, shared = (completion_hidden(model.base_model, rows, device) for rows in (plain, doubled))
    parts = alone.split([length - 1 for length in TEST_LENGTHS])
    twice = torch.cat([part for part in parts for _ in range(2)])
    return max(_difference(alone, packed), _difference(twice, shared))


def _difference(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@contextlib.contextmanager
def _small_windows(model: PreTrainedModel) -> Iterator[None]:
    """Sets every sliding window of the model to `TEST_WINDOW` meanwhile."""
    holders: dict[int, Any] = {id(model.config): model.config}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            if isinstance(getattr(holder, "sliding_window", None), int):
                holders[id(holder)] = holder
    before = [(holder, holder.sliding_window) for holder in holders.values() if getattr(holder, "sliding_window", None)]
    try:
        for holder, _ in before:
            holder.sliding_window = TEST_WINDOW
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window

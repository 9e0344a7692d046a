"""Activation checkpointing: what a layer's backward pass computes again instead of keeping it.

    none        nothing: each layer keeps all that its backward pass reads
    selective   all but the results of matrix products and attention, which take most of the time, little of the memory
    full        everything: a layer keeps its input alone

Not by transformers' own switch, which does nothing in eval mode, and a policy is always in it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_EXPENSIVE = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "torch_attn._varlen_attn.default",
)


def recompute_activations(layers: Sequence[nn.Module], how: str) -> None:
    """Makes the forward pass of each layer one that keeps less; `how` is learner.activation_checkpointing."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, expensive_operators())
    for layer in layers:
        # In the place of `forward`, and not by a module around it: names of parameters stay, and the hooks by which a
        # sharded layer gathers its weights stay outside, so that they are there when it computes again.
        layer.forward = _recomputed(layer.forward, options)


def expensive_operators() -> list[Any]:
    """The operators whose results are kept by selective checkpointing, as far as this build of torch has them."""
    importlib.import_module("torch.nn.attention.varlen")  # registers its operator
    found = []
    for name in _EXPENSIVE:
        place: Any = torch.ops
        try:
            for part in name.split("."):
                place = getattr(place, part)
        except (AttributeError, RuntimeError):
            continue  # of another build
        found.append(place)
    return found


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_that_keeps_less(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return forward_that_keeps_less

"""A tiny Qwen2 that computes in float64 throughout, with weights that no torch kernel made.

transformers computes norms and rotary angles in float32 whatever the dtype, and float32 differs from CPU to CPU by more
than the stored expectations allow. So both are replaced by the same mathematics in the dtype of the weights.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

VOCAB = 40
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class Rotary(nn.Module):
    """Rotary position embedding as Qwen2 has it, computed in float64."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = [theta ** (-index / head_dim) for index in range(0, head_dim, 2)]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * torch.tensor(self.frequencies, dtype=torch.float64)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def qwen2(*, hidden: int, layers: int) -> PreTrainedModel:
    """The architecture as transformers makes it, float32; its weights are to be filled."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def float64_qwen2(*, hidden: int = 16, layers: int = 2) -> PreTrainedModel:
    """`qwen2`, in float64 throughout."""
    model = qwen2(hidden=hidden, layers=layers)
    trunk = model.base_model
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if name in NORMS:
                setattr(module, name, nn.RMSNorm(hidden, eps=child.variance_epsilon))
    trunk.rotary_emb = Rotary(hidden // 4, 10_000.0)
    return model.double()


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """New values for every parameter from numpy, by the parameter's name alone; norms are near 1."""
    for name, parameter in module.named_parameters():
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        values = 2.0 * rng.random(tuple(parameter.shape)) - 1.0
        is_norm = name.split(".")[-2] in NORMS
        parameter.copy_(torch.from_numpy(1.0 + 0.1 * values if is_norm else 0.4 * values))

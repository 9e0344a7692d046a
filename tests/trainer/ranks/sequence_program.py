"""One rank of those that share the tokens of rows; rank 0 writes how far they are from one process.

python -m tests.trainer.ranks.sequence_program RESULTS
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.trainer.engines.device_rows import RowLayout, on_device
from asyncrl.trainer.engines.sequence_parallel import slice_of
from asyncrl.trainer.engines.trunk import use_packed_rows
from asyncrl.trainer.packing import pack_groups
from asyncrl.trainer.world import RankPlace, World
from tests.trainer.tiny import random_groups

CPU = torch.device("cpu")
# Heads of queries, of keys, and a window: keys for every rank, fewer than ranks, behind a window.
CASES = {"grouped": (4, 2, None), "fewer keys than ranks": (4, 1, None), "window": (4, 2, 5)}
REFUSED = (3, 3, None)


def model_of(heads: int, key_heads: int, window: int | None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=key_heads, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
        sliding_window=window, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    assert use_packed_rows(model)
    return model.base_model


def run(trunk, rows, layout: RowLayout, own: slice):
    """Hidden states of a slice of the inputs, and the gradients of a sum of them."""
    hidden = trunk(
        input_ids=rows.input_ids[None, own],
        position_ids=layout.position_ids[None, own],
        attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool),
        row_layout=layout,
        use_cache=False,
    ).last_hidden_state[0]
    weights = torch.cos(torch.arange(rows.num_inputs, dtype=torch.float64))[own, None]
    trunk.zero_grad()
    (weights * hidden.square()).sum().backward()
    return hidden.detach(), [parameter.grad.clone() for parameter in trunk.parameters()]


def odd_rows(shared_row_tokens: int):
    """Plain or shared rows whose inputs cannot be halved."""
    for seed in range(50):
        groups = random_groups(3, 3, seed=seed, prompt=(5, 40), completion=(1, 40), vocab=60)
        for batch in pack_groups(groups, 0, 10_000, shared_row_tokens=shared_row_tokens):
            if (batch.rows.segment_ids is not None) == (shared_row_tokens > 0) and batch.rows.num_inputs % 2:
                return on_device(batch.rows, CPU)
    raise AssertionError("no such rows")


def compare(case, shared_row_tokens: int, world: World) -> tuple[float, float]:
    """Largest difference from one process: of this rank's hidden states, of gradients relative to their largest."""
    trunk = model_of(*case)
    rows = odd_rows(shared_row_tokens)
    expected, expected_gradients = run(trunk, rows, rows.layout, slice(0, rows.num_inputs))
    own = slice_of(rows.num_inputs, world.rank, world.size)
    layout = dataclasses.replace(rows.layout, sequence_group=dist.group.WORLD)
    hidden, gradients = run(trunk, rows, layout, own)
    for gradient in gradients:
        dist.all_reduce(gradient)
    worst = [
        float((found - exact).abs().max() / exact.abs().max())
        for found, exact in zip(gradients, expected_gradients, strict=True)
    ]
    return float((hidden - expected[own]).abs().max()), max(worst)


def refusal(world: World) -> str:
    try:
        compare(REFUSED, 0, world)
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    world = World.form(RankPlace.from_environment(), CPU, timeout_s=120.0)
    found = {
        f"{name}, {layout}": compare(case, limit, world)
        for name, case in CASES.items()
        for layout, limit in (("plain", 0), ("shared", 400))
    }
    largest = {name: [float(world.largest(torch.tensor(value))) for value in values] for name, values in found.items()}
    refused = refusal(world)
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps({"found": largest, "refused": refused}))
    world.close()


if __name__ == "__main__":
    main()

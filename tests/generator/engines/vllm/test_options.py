"""What vLLM is told before it starts."""

from __future__ import annotations

import os

import pytest

from asyncrl.generator.engines.vllm.options import (
    EngineOptions,
    engine_arguments,
    prepare_environment,
    worker_cpus,
)


@pytest.mark.parametrize(
    ("num_workers", "threads", "cpus", "expected"),
    [
        (1, 1, [0, 1], "nobind"),
        (1, 4, [0], "nobind"),
        (2, 1, [0, 1], "0|1"),
        (2, 1, [3, 5, 7], "3|5"),
        (2, 2, [0, 1, 2, 3], "0,1|2,3"),
        (3, 2, [10, 11, 12, 13, 14, 15, 16], "10,11|12,13|14,15"),
        (2, 1, [0], "nobind"),
        (2, 2, [0, 1, 2], "nobind"),
    ],
)
def test_workers_get_cpus_of_their_own_where_there_are_enough(num_workers, threads, cpus, expected):
    options = EngineOptions("model", tensor_parallel_size=num_workers, threads=threads)
    assert worker_cpus(options, cpus) == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", {"TORCH_NCCL_NONBLOCKING_TIMEOUT": "11", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}), ("cpu", {})],
)
def test_workers_on_gpus_start_with_the_deadline_of_weight_channels_and_survive_a_broken_one(
    monkeypatch, device, expected
):
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(EngineOptions("model", device=device, weights_timeout_s=12.5))
    assert {name: value for name, value in os.environ.items() if "NCCL" in name} == expected


@pytest.mark.parametrize(
    ("device", "dtype", "head", "split_prompts"),
    [
        ("cuda", "bfloat16", {"head_dtype": "float32"}, True),
        ("cuda", "float32", None, True),
        ("cpu", "bfloat16", None, False),
        ("cpu", "float32", None, False),
    ],
)
def test_gpus_give_logits_in_float32_and_may_split_prompts(device, dtype, head, split_prompts):
    arguments = engine_arguments(EngineOptions("model", device=device, dtype=dtype), "asyncrl", "an.Extension")
    assert arguments.get("hf_overrides") == head
    assert arguments["enable_chunked_prefill"] is split_prompts

"""What vLLM is told before it starts."""

from __future__ import annotations

import os

import pytest

from asyncrl.generator.engines.vllm.options import EngineOptions, prepare_environment, worker_cpus


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

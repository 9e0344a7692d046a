"""The parts of the GPU check, each run in a process of its own: `python -m benchmarks.gpu.sections NAME JSON`.

JSON has the keys of `Request`. The figures go to its file `result` as they come, so that what was measured before a
failure or a deadline is kept.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS = 32
H100_FLOPS = 989e12  # of H100 and H200 in bfloat16, without sparsity, by NVIDIA's data sheet
MEASURED_STEPS = 3
NOT_IN_TRAINING = ("snapshot", "CUDA context")  # of the forecast: a rank's, and not the allocator's
STOP_TIMEOUT_S = 15.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    """What a section is to do, and where."""

    result: str  # file
    folder: str  # for models and runs
    device: str
    seconds: float  # a section that knows how ends by itself before that
    shape: str = "tiny"
    length: int = 64  # of each sequence, in tokens
    batch_tokens: int = 256
    micro_batch_tokens: int = 128
    checkpointing: str = "none"
    steps: int = 3
    gpu_memory_fraction: float = 0.3


Figures = dict[str, Any]


def keep(request: Request, figures: Figures) -> None:
    """Writes what is known so far."""
    fresh = Path(f"{request.result}.new")
    fresh.write_text(json.dumps(figures, indent=1))
    fresh.replace(request.result)


# -- what is here ------------------------------------------------------------------------------------------------------


def environment(request: Request) -> None:
    """Versions, the GPU, and what it reaches in a large matrix product and in a copy."""
    import torch

    figures: Figures = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for module in ("transformers", "vllm", "peft"):
        try:
            figures[module] = __import__(module).__version__
        except ImportError as error:
            figures[module] = f"not here: {error}"
    size = 8192 if request.device == "cuda" else 512
    if request.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {"gpu": properties.name, "gpu_gib": properties.total_memory / 2**30}
        figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    keep(request, figures)
    left = torch.randn(size, size, device=request.device, dtype=torch.bfloat16)
    figures["matmul_tflops"] = 2 * size**3 / _seconds(request, lambda: left @ left) / 1e12
    source = torch.empty(2**30 if request.device == "cuda" else 2**24, dtype=torch.uint8, device=request.device)
    target = torch.empty_like(source)
    figures["copy_gb_per_s"] = source.numel() / _seconds(request, lambda: target.copy_(source)) / 1e9
    keep(request, figures)


def _seconds(request: Request, work: Callable[[], object], times: int = 5) -> float:
    """The median duration of `work`, after a first call that is not counted."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        _wait(request.device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _device(request: Request) -> Any:
    """The device for torch, which is made to fit the learner where it is older than the one of the lock files."""
    import torch
    from torch.nn.attention import varlen

    if request.device == "cpu":
        return torch.device("cpu")
    attention = varlen.varlen_attn
    if "enable_gqa" not in inspect.signature(attention).parameters:
        # Its kernel takes fewer heads of keys than of queries all the same.
        def without_gqa(*tensors: Any, enable_gqa: bool, **others: Any) -> Any:
            return attention(*tensors, **others)

        varlen.varlen_attn = without_gqa
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def model_of(request: Request) -> Path:
    """The folder of the model of this shape; it is made by the first section that asks for it."""
    from benchmarks.gpu.shapes import make_model

    folder = Path(request.folder) / f"model-{request.shape}"
    make_model(folder, request.shape, request.device)
    return folder


# -- the learner -------------------------------------------------------------------------------------------------------


def _config(request: Request) -> Any:
    from asyncrl.config.loading import load_config

    return load_config(None, [*_settings(request), "run.name=gpu_check", f"run.dir={request.folder}/run"])


def _settings(request: Request) -> list[str]:
    dtype = "bfloat16" if request.device == "cuda" else "float32"
    return [
        f"model.path={model_of(request)}",
        f"model.dtype={dtype}",
        f"model.max_length={request.length}",
        f"sampling.max_new_tokens={request.length - PROMPT_TOKENS}",
        f"learner.device={request.device}",
        f"learner.micro_batch_tokens={request.micro_batch_tokens}",
        f"learner.activation_checkpointing={request.checkpointing}",
        "learner.engine=fsdp",
        f"generator.device={request.device}",
    ]


def _groups(request: Request, vocab: int) -> list[Any]:
    """Groups of full length that fill the batch."""
    import numpy as np

    from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan

    rng = np.random.default_rng(0)
    count, length = request.batch_tokens // request.length, request.length - PROMPT_TOKENS
    size = min(8, count)

    def rollout() -> Rollout:
        return Rollout(
            token_ids=rng.integers(2, vocab, length).astype(np.int32),
            behaviour_logprobs=np.full(length, -math.log(vocab), dtype=np.float32),
            version_spans=(VersionSpan(0, length, 0),),
            finish_reason=FinishReason.LENGTH,
            reward=float(rng.random()),
        )

    return [
        Group(
            LeaseKey(LeaseKind.TRAIN, ordinal, 0),
            rng.integers(2, vocab, PROMPT_TOKENS).astype(np.int32),
            [rollout() for _ in range(size)],
        )
        for ordinal in range(count // size)
    ]


def learner(request: Request) -> None:
    """Tokens/s and MFU of training steps of packed rows, and their memory beside the forecast."""
    import torch

    from asyncrl.trainer.engines.fsdp import load_fsdp_engines
    from asyncrl.trainer.step import StepRunner
    from asyncrl.trainer.world import World
    from benchmarks.gpu.shapes import SHAPES

    config, shape = _config(request), SHAPES[request.shape]
    figures: Figures = {"forecast": _forecast(request, config)}
    keep(request, figures)
    if request.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the model may have been made here
    world = World.alone()
    runner = StepRunner(load_fsdp_engines(config, _device(request), world), config, world=world)
    groups = _groups(request, shape.vocab)
    lengths = [request.length] * sum(len(group.rollouts) for group in groups)
    figures["tokens_of_a_step"], figures["step_s"] = sum(lengths), []
    for number in range(1 + MEASURED_STEPS):
        _wait(request.device)
        started = time.perf_counter()
        metrics = runner.step(groups).metrics
        _wait(request.device)
        if number:  # the first one allocates and compiles
            figures["step_s"].append(time.perf_counter() - started)
            median = statistics.median(figures["step_s"])
            figures["tokens_per_s"] = sum(lengths) / median
            figures["mfu"] = shape.training_flops(lengths) / median / H100_FLOPS
        figures["metrics"] = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if request.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            figures["measured_gib"] = peak / 2**30
            figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
            figures["measured_over_forecast"] = peak / 2**30 / figures["forecast"]["training_gib"]
        keep(request, figures)


def _forecast(request: Request, config: Any) -> Figures:
    from asyncrl.cli.forecast import GPU, HOST, learner_needs
    from asyncrl.host.model_folder import find_model

    on_gpu = request.device == "cuda"
    needs = learner_needs(config, find_model(config.model.path), on_gpu=on_gpu)
    place = GPU if on_gpu else HOST
    parts = {need.name: need.num_bytes / 2**30 for need in needs if need.place == place}
    training = sum(size for name, size in parts.items() if not name.startswith(NOT_IN_TRAINING))
    return {"parts_gib": parts, "training_gib": training}


def numerics(request: Request) -> None:
    """Log-probs of the same tokens: bfloat16 on the device by packed rows, against float32 on the CPU."""
    import numpy as np
    import torch

    from asyncrl.trainer.engines.fsdp import load_fsdp_engines
    from asyncrl.trainer.engines.single import load_engines
    from asyncrl.trainer.world import World
    from benchmarks.gpu.shapes import SHAPES

    config = _config(request)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, SHAPES[request.shape].vocab, request.length - number) for number in range(4)]
    on_device = load_fsdp_engines(config, _device(request), World.alone()).actor.score(sequences)
    config.model.dtype, config.learner.device = "float32", "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    on_cpu = load_engines(config, torch.device("cpu")).actor.score(sequences)
    difference = np.abs(np.concatenate(on_device) - np.concatenate(on_cpu))
    keep(request, {"max_nats": float(difference.max()), "mean_nats": float(difference.mean())})


# -- whole runs --------------------------------------------------------------------------------------------------------


def run(request: Request) -> None:
    """Learner and generator on one device, by `asyncrl run`: steps, syncs and pauses as metrics.jsonl has them."""
    from asyncrl.config.loading import to_yaml

    folder = Path(request.folder) / f"run-{request.shape}"
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(request)
    config.run.dir, config.run.steps = str(folder / "run"), request.steps
    config.task.path = "benchmarks.gpu.digits_task:Digits"
    config.learner.groups_per_step, config.sampling.group_size = 4, 8
    config.generator.max_sequences = 64
    config.generator.gpu_memory_fraction = request.gpu_memory_fraction
    config.eval.every = 0
    config.generator.kv_cache_gib = 0.25
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    deadline = time.monotonic() + request.seconds
    log = folder / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "asyncrl.cli.main", "run", str(file)], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        while process.poll() is None and time.monotonic() < deadline:
            keep(request, _run_figures(folder))
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
    figures = _run_figures(folder)
    keep(request, figures)
    if process.returncode != 0 or figures["steps"] < request.steps:
        ends = [f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in folder.rglob("*.log")]
        raise RuntimeError(
            f"exit code {process.returncode}, {figures['steps']} of {request.steps} steps\n" + "\n".join(ends)
        )


def _run_figures(folder: Path) -> Figures:
    records: dict[str, list[Figures]] = {}
    path = folder / "run" / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        records.setdefault(record["kind"], []).append(record)
    log = folder / "output.log"
    over = re.findall(r"weights travel to \S+ over (\w+)", log.read_text(errors="replace") if log.exists() else "")
    figures: Figures = {"steps": len(records.get("step", [])), "weights_over": sorted(set(over))}
    for kind in ("sync", "step"):
        names = {name for record in records.get(kind, []) for name, value in record.items() if _is_number(value)}
        figures[f"{kind}_medians"] = {
            name: statistics.median(record[name] for record in records[kind] if _is_number(record.get(name)))
            for name in sorted(names)
        }
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def engine_tests(request: Request) -> None:
    """The tests of the vLLM engine, on this device."""
    report = Path(request.folder) / "engine_tests.xml"
    environment = os.environ | {"ASYNCRL_TEST_DEVICE": request.device}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    tests = (
        "tests/generator/engines/vllm" if request.shape != "tiny" else "tests/generator/engines/vllm/test_options.py"
    )
    done = subprocess.run(
        [*command, tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=request.seconds,
        check=False,
    )
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    keep(request, {"tests": len(cases), "failed": [f"{case.get('classname')}.{case.get('name')}" for case in bad]})
    if done.returncode != 0:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-1000:]}")


SECTIONS: dict[str, Callable[[Request], None]] = {
    "environment": environment,
    "learner": learner,
    "numerics": numerics,
    "run": run,
    "engine_tests": engine_tests,
}


def main() -> None:
    """Runs one section. What it raises goes to stderr, and the exit code is 1."""
    name, request = sys.argv[1:]
    SECTIONS[name](Request(**json.loads(request)))


if __name__ == "__main__":
    main()

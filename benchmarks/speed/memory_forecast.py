"""How far the forecast of a trainer's memory (`--dry-run`) is from what a trainer takes, for eight configurations.

    python -m benchmarks.speed.memory_forecast [--quick]

A Qwen2 of 29 or 58 million parameters on the CPU, each configuration in a process of its own, which does what a rank
does without its desk: loads models, makes steps of several micro-batches, copies each version into snapshot buffers and
saves checkpoints beside training. Measured is the largest resident size of that process. The bar: within a tenth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from asyncrl.config import Config
from asyncrl.host.processes import heap_environment
from benchmarks import common

BAR = "0.9 to 1.1"
TIMEOUT_S = 400
SMALL = {"vocab": 20_000, "hidden": 512, "layers": 4}
CONFIGURATIONS: dict[str, list[str]] = {
    "full, float32": [],
    "full, bfloat16": ["model.dtype=bfloat16"],
    "with a reference": ["algorithm.kl_coef=0.1"],
    "lora": ["update.what=lora"],
    "partial": ["update.what=partial", "update.names=[model.layers.*]"],
    "ppo, own critic": ["algorithm.name=ppo"],
    "ppo, shared critic": ["algorithm.name=ppo", "critic.trunk=shared"],
    "large micro-batches": ["learner.micro_batch_tokens=2560", "learner.groups_per_step=6"],
}
STEPS = 2


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2:])))
        return 0
    options = common.parse(common.arguments(__doc__ or "", pairs=1))
    report = common.Report("memory_forecast", options)
    chosen = list(CONFIGURATIONS.items())[:2] if options.quick else list(CONFIGURATIONS.items())
    ratios = []
    for name, overrides in chosen:
        found = in_a_process(overrides)
        ratios.append(
            report.pairs(name, "MB", [found["forecast"] / 1e6], [found["measured"] / 1e6], "largest resident size", BAR)
        )
    report.finish()
    return 0 if all(0.9 <= ratio <= 1.1 for ratio in ratios) else 1


def in_a_process(overrides: list[str]) -> dict[str, float]:
    """One measurement; its memory is nobody else's."""
    command = [sys.executable, "-m", "benchmarks.speed.memory_forecast", "--one", *overrides]
    environment = {**os.environ, **heap_environment()}  # as a rank is started
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(overrides: list[str]) -> dict[str, float]:
    """Bytes that a trainer takes at most, and what the learner's dry run says of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_model(folder / "model", overrides)
        measured = train(config, folder)
        from asyncrl.cli.forecast import HOST, learner_needs
        from asyncrl.host.model_folder import find_model

        needs = [
            need for need in learner_needs(config, find_model(config.model.path), on_gpu=False) if need.place == HOST
        ]
        for need in needs:
            print(f"{need.num_bytes / 1e6:8.1f} MB  {need.name}")
        own = [need for need in needs if not need.name.startswith(("replay buffer", "desk"))]
        return {"measured": measured, "forecast": sum(need.num_bytes for need in own)}


def make_model(folder: Path, overrides: list[str]) -> Config:
    """Writes a model in a process of its own, whose memory does not count; returns the configuration."""
    code = (
        "import sys; from tests.trainer.tiny import tiny_model\n"
        f"tiny_model(tied=False, **{SMALL!r}).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, timeout=TIMEOUT_S)
    (folder / "tokenizer.json").write_text("{}")
    from asyncrl.config.loading import load_config

    return load_config(
        None,
        [
            f"model.path={folder}", "model.max_length=256", "sampling.max_new_tokens=128",
            "learner.micro_batch_tokens=1536", "learner.groups_per_step=3", *overrides,
        ],
    )  # fmt: skip


def train(config: Config, folder: Path) -> int:
    """What a rank does, for some steps; the largest resident size in bytes."""
    import torch

    from asyncrl.trainer.checkpoint_writer import CheckpointWriter
    from asyncrl.trainer.engines.single import load_engines
    from asyncrl.trainer.step import StepRunner
    from asyncrl.weights.bytes.snapshot import SnapshotBuffer
    from tests.trainer.tiny import random_groups

    torch.set_num_threads(1)
    runner = StepRunner(load_engines(config, torch.device("cpu")), config)
    source = runner.engines.actor.tensors()
    wire = torch.bfloat16 if config.model.dtype == "bfloat16" else None
    buffers = [SnapshotBuffer(source.named, 2**26, wire, adapted=source.adapted, patch=source.patch)]
    # In bfloat16 most words stay as they are, and the publisher keeps the version before to send the difference.
    buffers += [buffers[0].twin() for _ in range(2 if wire else 1)]
    canary = runner.engines.actor.sample_sequences(4, 32, 0)
    writer = CheckpointWriter(folder / "checkpoints", runner, keep=1)
    trace = []
    for step in range(STEPS):
        count = config.learner.groups_per_step
        groups = random_groups(count, 8, prompt=(60, 64), completion=(100, 128), vocab=SMALL["vocab"], seed=step)
        runner.step(groups)
        runner.engines.actor.score(canary)
        buffers[step % len(buffers)].snapshot()
        if writer.is_busy:
            saved = writer.finished(TIMEOUT_S)
            assert saved is not None and not saved.error, saved
        writer.begin(run_epoch=1)
        trace.append(resident("VmHWM"))
    writer.finished(TIMEOUT_S)
    print("peaks", [round(peak / 1e6) for peak in trace])
    return resident("VmHWM")


def resident(which: str, process: int | str = "self") -> int:
    """A line of /proc/PROCESS/status, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {which}")


if __name__ == "__main__":
    sys.exit(main())

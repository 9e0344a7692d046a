"""The trainer's step of asyncrl, one for each line on stdin: the other side of `trl_worker`.

    python -m benchmarks.speed.learner_worker CONFIG BATCH.npz

StepRunner.step is what a trainer rank calls for each batch: groups in, plan, packing, loss, backward, clip, optimizer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def groups_of(path: Path, group_size: int) -> list[Any]:
    """The groups of a batch file."""
    from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan

    with np.load(path) as file:
        lengths, prompts, tokens = file["lengths"], file["prompts"], file["tokens"]
        old, rewards = file["old_logprobs"], file["rewards"]
    cuts = np.cumsum(lengths)[:-1]
    rollouts = [
        Rollout(token_ids, logprobs, (VersionSpan(0, len(token_ids), 0),), FinishReason.LENGTH, float(reward))
        for token_ids, logprobs, reward in zip(np.split(tokens, cuts), np.split(old, cuts), rewards, strict=True)
    ]
    return [
        Group(LeaseKey(LeaseKind.TRAIN, index, 0), prompts[index * group_size], rollouts[first : first + group_size])
        for index, first in enumerate(range(0, len(rollouts), group_size))
    ]


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from asyncrl.config.loading import load_config
    from asyncrl.trainer.engines.single import load_engines
    from asyncrl.trainer.step import StepRunner

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    config = load_config(Path(sys.argv[1]), [])
    torch.set_num_threads(config.learner.threads)
    runner = StepRunner(load_engines(config, torch.device("cpu")), config)
    groups = groups_of(Path(sys.argv[2]), config.sampling.group_size)
    tokens = sum(group.num_tokens for group in groups)
    say(ready=True)
    while sys.stdin.readline():
        started, cpu = time.perf_counter(), time.process_time()
        result = runner.step(groups)
        say(
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu,
            loss=result.metrics["loss"],
            grad_norm=result.metrics["grad_norm"],
            tokens=tokens,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

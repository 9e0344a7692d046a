"""`learner.deterministic`: what a rank switches on by it, and the bits that steps give after that."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.warm_processes import run_warm

ROOT = Path(__file__).resolve().parents[2]
# A rank until it asks for its device, when all is switched; then steps, without a desk.
PROGRAM = """
import json, os, sys
import torch
from asyncrl.trainer import rank
from asyncrl.trainer.engines.part import local
from asyncrl.weights.bytes.digest import digest
from tests.trainer.ranks.cases import CASES, groups_of, runner_of

def refused():
    try:
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    except RuntimeError as error:
        return "deterministic" in str(error)
    return False

def steps(*_):
    case = CASES["float32"]
    runner = runner_of(case)
    norms = [runner.step(groups_of(case, number)).metrics["grad_norm"] for number in range(3)]
    state = runner.state().engines
    found = {
        "on": torch.are_deterministic_algorithms_enabled(),
        "refused": refused(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "norms": norms,
        "weights": {name: digest(local(tensor).contiguous()) for name, tensor in state.policy.weights.items()},
    }
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)

rank._device = steps
rank.run_rank(sys.argv[1], "127.0.0.1:1")
"""


def seen(folder: Path, deterministic: bool) -> dict:
    file = folder / f"{deterministic}.yaml"
    text = f"model:\n  path: {folder}\nlearner:\n  deterministic: {str(deterministic).lower()}\n  threads: 2\n"
    file.write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-c", PROGRAM, str(file)]
    done = run_warm(command, timeout_s=240, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def deterministic(tmp_path_factory) -> dict:
    """What a process saw that has it switched on."""
    return seen(tmp_path_factory.mktemp("deterministic"), True)


@pytest.mark.bits
def test_two_processes_compute_the_same_bits(deterministic, tmp_path):
    first, second = deterministic, seen(tmp_path, True)
    assert first == second
    assert len(set(first["norms"])) == 3 and first["weights"]


def test_what_it_switches_on_is_on(deterministic, tmp_path):
    with_it, without = deterministic, seen(tmp_path, False)
    assert (with_it["on"], with_it["refused"], with_it["fills"]) == (True, True, False)
    assert with_it["cublas"] == ":4096:8"
    assert (without["on"], without["refused"], without["cublas"]) == (False, False, None)

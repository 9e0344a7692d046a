"""Ranks that hold several copies of a model compute what one does, and do each thing once: count, send, write.

The quick test of two ranks is in test_two_ranks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from asyncrl.cli.export import export_checkpoint
from asyncrl.config import Config
from tests.trainer.ranks.cases import REPLICA_MUTANTS, VARIANTS
from tests.trainer.ranks.loading_cases import save_model
from tests.trainer.ranks.test_equal_to_one_rank import TOLERANCE, Results, results_of, worst_of
from tests.trainer.tiny import save_tiny_model

pytestmark = pytest.mark.bits

STEPS = 2
# Two copies of the model, on two ranks each.
FOUR = ("grpo", "ppo_own_trunk", "ppo_shared_trunk", "lora", "partial", "offloaded", "few_rows")
# Ranks that share sequences within a copy; across copies, of which each has one; and across copies of two.
SHARED = ("grpo s2 x2", "few_inputs s2 x2", "ppo_own_trunk s2 x4", "lora s4 x2")


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[Results, Path]:
    folder = folder_of(tmp_path_factory, "four")
    cases, spoiled = (*FOUR, *SHARED), (*REPLICA_MUTANTS, *VARIANTS)
    return results_of(4, STEPS, cases, spoiled, folder, replicas=2), folder


def folder_of(tmp_path_factory, name: str) -> Path:
    folder: Path = tmp_path_factory.mktemp(name)
    for model in ("own critic", "lora in bfloat16"):
        save_model(model, folder / model)
    save_tiny_model(folder / "other", seed=1)
    return folder


def check_figures(results: Results, cases) -> None:
    for name in cases:
        figure, off = worst_of(results[name])
        assert off <= TOLERANCE, (name, figure)
        assert any(key.startswith("gradient of") for key in results[name]["worst"]), name


def check_copies(ranks) -> None:
    check_what_is_sent([rank["sent"] for rank in ranks])
    for rank in ranks:
        assert rank["loaded"] and not any(rank["loaded"].values())
        assert rank["norms"] == 1.0, "that of the first copy, on all ranks"
    check_divergence(ranks, len(ranks) - 1, len(ranks) // 2 - 1)
    check_checkpoints([rank["checkpoint"] for rank in ranks])


def check_what_is_sent(ranks) -> None:
    for method in ("full", "lora"):
        own = [rank[method] for rank in ranks]
        assert len({each["layout"] for each in own}) == 1, "all know who sends what"
        assert not any(each["wrong"] for each in own), "the bytes of the layout that was agreed"
        assert sum(each["bytes"] for each in own) == own[0]["total"], "each once"
        assert max(each["bytes"] for each in own) < 1.1 * own[0]["total"] / len(own), "by all in equal parts"


def check_divergence(ranks, last: int, first: int) -> None:
    names = {
        "weights": "model.layers.1.mlp.up_proj.weight of the policy",
        "moments": "exp_avg_sq of model.norm.weight of the policy",
        "critic": "trunk.norm.weight of the critic",
    }
    for rank in ranks:
        for what, name in names.items():
            assert rank["diverged"][what].startswith(
                f"trainer rank {last} and rank {first} differ in their slice of {name} ("
            )
        for of, said in rank["other files"].items():
            assert said.startswith("ConfigError: trainer rank ") and f" of {of} (" in said
            assert said.endswith("): their hosts have different files; give all of them one model folder")


def check_checkpoints(ranks) -> None:
    for rank in ranks:
        assert all(rank[how] for how in ("same", "went on", "without", "back"))
    assert ranks[0]["one"]
    written, held = ranks[0]["elements"]
    assert written == held, "each element is in the files once"
    assert ranks[0]["share"] < 1.2 / len(ranks), "and all ranks write about as much"


def check_exports(folder: Path) -> None:
    """Three ways to one model: the ranks', the command line's out of their files, and that of one rank."""
    config = Config()
    config.run.dir = str(folder)
    (folder / "checkpoints").symlink_to(folder / "saved")
    exported = export_checkpoint(config, "latest", adapters=False)
    one = load_file(next((folder / "of one").glob("step_*")) / "model.safetensors")
    for other in (exported, folder / "export"):
        tensors = load_file(other / "model.safetensors")
        assert tensors.keys() == one.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in one.items()), other
    state = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    shards = next((folder / "saved").glob("step_*")) / "trainer" / "weights"
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(shards)), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in one.items()), "torch's own reader"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_copies_on_two_ranks_each_are_as_one_rank(four):
    results, folder = four
    check_figures(results, (*FOUR, *SHARED, *VARIANTS))
    for name in REPLICA_MUTANTS:
        assert worst_of(results[name])[1] > 1e-2, name
    assert results["canary"]["off"] < 1e-5
    assert results["differing"][:2] == ["", ""]
    check_copies(results["replicas"])
    check_exports(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_of_four_ranks_goes_on_with_two(four, tmp_path_factory):
    folder = folder_of(tmp_path_factory, "given")
    shutil.copytree(four[1] / "saved", folder / "given", symlinks=True)
    shutil.copy(four[1] / "saved.json", folder / "given.json")
    results = results_of(2, STEPS, (), (), folder, replicas=2)
    assert all(rank["checkpoint"]["given"] for rank in results["replicas"])

"""Checkpoints of several ranks, by real gloo worlds with sharded models: 2 -> 1, 2, 3 ranks and 1 -> 2."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from asyncrl.cli.export import export_checkpoint
from asyncrl.storage.checkpoint_files import find_latest
from tests.tolerances import assert_near
from tests.trainer.checkpoint_world import config_of
from tests.trainer.tiny import save_tiny_model
from tests.warm_processes import WarmProcess

pytestmark = pytest.mark.bits

ROOT = Path(__file__).parents[2]
METHODS = ["full", pytest.param("lora", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.slow)]


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module", params=METHODS)
def worlds(request, tmp_path_factory):
    """(method, folder, what each of three processes saw)."""
    folder = tmp_path_factory.mktemp("worlds")
    save_tiny_model(folder / "model")
    command = [sys.executable, "-m", "tests.trainer.checkpoint_world"]
    arguments = [str(folder), request.param, *free_ports(5)]
    log = folder / "log"
    with log.open("ab") as output:
        processes = [
            WarmProcess([*command, str(rank), *arguments], cwd=ROOT, stdout=output, stderr=output) for rank in range(3)
        ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0], log.read_text(errors="replace")
    return request.param, folder, [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(3)]


def test_a_checkpoint_of_two_ranks_goes_on_with_two_bit_for_bit(worlds):
    _, _, seen = worlds
    assert seen[0]["saved"] and seen[1]["saved"]
    for rank in range(2):
        assert seen[rank]["again"] == seen[0]["saves"], "weights, moments and counts of steps"
        assert seen[rank]["again went on"] == seen[rank]["went on"] != {}


def test_it_goes_on_with_one_and_with_three_from_the_same_weights(worlds):
    _, _, seen = worlds
    assert [seen[rank]["three"] for rank in range(3)] == [seen[0]["saves"]] * 3
    assert seen[0]["one"] == seen[0]["saves"]
    assert all(seen[rank]["three went on"] for rank in range(3)) and seen[0]["one went on"]


def test_a_checkpoint_of_one_rank_goes_on_with_two(worlds):
    _, folder, seen = worlds
    assert seen[0]["back"] == seen[1]["back"] == seen[0]["saves"]
    # Those two hold what they held before the detour: they go on to the same bits.
    assert [seen[rank]["back went on"] for rank in range(2)] == [seen[rank]["went on"] for rank in range(2)]


def test_a_rank_that_cannot_write_its_part_is_named_and_costs_one_checkpoint(worlds):
    _, _, seen = worlds
    first, unseen, full, no_folder, left, then = seen[0]["troubles"]
    assert first.endswith("step_5")
    assert "rank 1 could not write its part: CheckpointError" in unseen
    assert "elsewhere of rank 0 cannot be seen here" in unseen and "all hosts of the learner share" in unseen
    assert "rank 1 could not write its part: OSError" in full and "File too large" in full
    assert "Not a directory" in no_folder or "File exists" in no_folder
    assert left == "latest,step_5", "what was there before is there, and nothing half-written"
    assert then.endswith("step_6")
    assert seen[1]["troubles"] == [""] * 5, "rank 0 speaks for all"


def test_torchs_own_reader_puts_the_shards_together(worlds):
    method, folder, _ = worlds
    shards = folder / "saved" / "step_3" / "trainer" / "weights"
    assert sorted(path.name for path in shards.iterdir()) == [
        "rank_00001_of_00002.safetensors", "rank_00002_of_00002.safetensors"
    ]  # fmt: skip
    by_one = folder / "saved by one" / "step_3" / ("adapter" if method == "lora" else "")
    whole = load_file(next(by_one.glob("*.safetensors")))
    whole = {name.removeprefix("base_model.model."): tensor for name, tensor in whole.items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(shards)), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def test_the_command_line_exports_a_model_of_shards_as_the_ranks_did(worlds):
    method, folder, _ = worlds
    config = config_of(method, folder / "model")
    config.run.dir = str(folder)
    (folder / "checkpoints").symlink_to(folder / "saved")
    exported = export_checkpoint(config, "latest", adapters=False)
    ours, ranks = (load_file(path / "model.safetensors") for path in (exported, folder / "export"))
    assert ours.keys() == ranks.keys()
    for name, tensor in ranks.items():
        if method == "lora":
            assert_near(ours[name], tensor)  # numpy merges adapters with other kernels
        else:
            assert torch.equal(ours[name], tensor), name
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (exported / "tokenizer.json").is_file()
    config.model.dtype = "bfloat16"
    narrow = load_file(export_checkpoint(config, "latest", adapters=False) / "model.safetensors")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in ours.items())
    if method == "lora":
        adapters = export_checkpoint(config, "latest", adapters=True)
        assert {path.name for path in adapters.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        whole = load_file(next((folder / "saved by one" / "step_3").glob("adapter/*.safetensors")))
        parts = load_file(adapters / "adapter_model.safetensors")
        assert whole.keys() == parts.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


def test_what_was_saved_verifies_and_names_its_ranks(worlds):
    _, folder, _ = worlds
    manifest = find_latest(folder / "saved")
    assert manifest is not None and (manifest.version, manifest.extra["ranks"]) == (3, 2)
    assert not [name for name in manifest.files if name.endswith((".pt", ".marker", ".metadata"))]

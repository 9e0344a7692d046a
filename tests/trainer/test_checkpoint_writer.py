"""Checkpoints beside training: what is saved is the state at `begin`, whatever training does meanwhile."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoint_files import find_latest, read_manifest
from asyncrl.storage.tensor_files import Content, pieces_of, read_piece, write_tensors
from asyncrl.trainer import checkpoint_writer
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.checkpoint_writer import CheckpointWriter
from tests.trainer.test_step import make_trainer, weights_of
from tests.trainer.tiny import random_groups, tiny_policy
from tests.warm_processes import run_warm

pytestmark = pytest.mark.bits


def stepped(steps: int, **kwargs):
    trainer = make_trainer(**kwargs)
    for seed in range(steps):
        trainer.step(random_groups(3, 4, seed=seed))
    return trainer


@pytest.fixture
def held_back(monkeypatch):
    """The writer's thread waits for this event before it writes."""
    go, real = threading.Event(), checkpoint_writer.write_state

    def write_state(*args):
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(checkpoint_writer, "write_state", write_state)
    yield go
    go.set()


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path, held_back):
    trainer = stepped(2)
    writer = CheckpointWriter(tmp_path, trainer, keep=2)
    writer.begin(run_epoch=3, desk_state=b"then")
    assert writer.finished() is None and writer.is_busy
    after = [trainer.step(random_groups(3, 4, seed=seed)).metrics for seed in (2, 3)]
    assert find_latest(tmp_path) is None, "nothing is durable yet, and nobody was told that it is"
    assert writer.finished() is None
    held_back.set()
    saved = writer.finished(60)
    assert saved is not None and (saved.version, saved.error) == (2, "")
    assert 0 < saved.blocked_s < saved.seconds
    assert not writer.is_busy and writer.finished() is None, "told once"
    restored = make_trainer(tiny_policy(seed=9))
    assert load_checkpoint(tmp_path, restored).version == 2
    assert [restored.step(random_groups(3, 4, seed=seed)).metrics for seed in (2, 3)] == after
    assert all(torch.equal(a, b) for a, b in zip(weights_of(trainer), weights_of(restored), strict=True))


def test_the_copies_are_used_again_and_there_is_one_checkpoint_at_a_time(tmp_path, held_back):
    trainer = stepped(1)
    writer = CheckpointWriter(tmp_path, trainer, keep=2)
    assert writer.host_bytes == 0
    writer.begin(run_epoch=1)
    with pytest.raises(AssertionError, match="one checkpoint at a time"):
        writer.begin(run_epoch=1)
    held_back.set()
    assert writer.finished(60).version == 1
    copied, parameters = writer.host_bytes, sum(weight.numel() for weight in weights_of(trainer))
    assert copied == 12 * parameters + 4 * len(weights_of(trainer)), "float32 weights and two moments; counts of steps"
    trainer.step(random_groups(3, 4, seed=1))
    writer.begin(run_epoch=1)
    assert writer.finished(60).version == 2
    assert writer.host_bytes == copied
    first, second = (load_file(tmp_path / f"step_{version}" / "model.safetensors") for version in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_fails_is_told_and_the_next_one_is_saved(tmp_path):
    trainer = stepped(1)
    save_checkpoint(tmp_path, trainer, run_epoch=1)
    trainer.step(random_groups(3, 4, seed=1))
    writer = CheckpointWriter(tmp_path, trainer, keep=2)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # the last thing a save replaces
    writer.begin(run_epoch=1)
    assert "checkpoint of version 2" in writer.finished(60).error
    assert not list(tmp_path.glob("*.tmp-*"))
    (tmp_path / "latest").rmdir()
    writer.begin(run_epoch=1)
    assert writer.finished(60).error == ""
    with pytest.raises(CheckpointError, match="Not a directory"):
        save_checkpoint(tmp_path / "step_2" / "config.json", trainer, run_epoch=1)


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
from tests.trainer.test_checkpoint_writer import stepped
from tests.trainer.tiny import random_groups
from asyncrl.storage import tensor_files
from asyncrl.trainer.checkpoint_writer import CheckpointWriter

root, trainer = Path(sys.argv[1]), stepped(1)
writer = CheckpointWriter(root, trainer, keep=1)
writer.begin(run_epoch=1)
assert writer.finished(60).error == ""
trainer.step(random_groups(3, 4, seed=1))
tensor_files.BLOCK_BYTES, written, real = 64, [0], os.write

def write(descriptor, data):
    written[0] += 1
    if written[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor, data)

tensor_files.os.write = write
writer.begin(run_epoch=1)
writer.finished(60)
print("written", written[0])
"""


def test_a_kill_in_the_middle_of_a_file_leaves_the_older_checkpoint(tmp_path):
    root = str(Path(__file__).parents[2])
    done = run_warm([sys.executable, "-c", KILLED, str(tmp_path), root, "300"], timeout_s=120)
    assert done.returncode == -signal.SIGKILL, done.stderr + done.stdout
    (half,) = tmp_path.glob("step_2.tmp-*")
    assert any(file.stat().st_size % 64 for file in half.rglob("*.safetensors")), "some bytes were written"
    trainer = make_trainer(tiny_policy(seed=9))
    assert load_checkpoint(tmp_path, trainer).version == 1
    trainer.step(random_groups(3, 4, seed=1))
    save_checkpoint(tmp_path, trainer, run_epoch=1)
    assert not list(tmp_path.glob("*.tmp-*")) and find_latest(tmp_path).version == 2


def test_no_file_of_a_checkpoint_is_pickled_and_all_proofs_are_of_what_lies_there(tmp_path):
    path = save_checkpoint(tmp_path, stepped(1), run_epoch=1)
    names = set(read_manifest(path).files)  # every byte compared with the digest that was made while writing
    assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".bin"}
    assert json.loads((path / "trainer" / "state.json").read_text())["ranks"] == 1
    assert read_manifest(path).extra["ranks"] == 1


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.arange(5, dtype=torch.bfloat16),
        "wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }
    kinds = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.float32: "F32"}
    contents = [
        Content(
            name, kinds[value.dtype], tuple(value.shape), lambda v=value: v.reshape(-1).view(torch.uint8).numpy().data
        )
        for name, value in tensors.items()
    ]
    size, _ = write_tensors(tmp_path / "ours.safetensors", contents)
    assert size == (tmp_path / "ours.safetensors").stat().st_size
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(
        torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype for name, value in tensors.items()
    )
    (piece,) = pieces_of([tmp_path / "ours.safetensors"])["wide"]
    assert bytes(read_piece(piece)) == tensors["wide"].numpy().tobytes()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "ours.safetensors").read_bytes()[:20])
    with pytest.raises(ValueError, match="is no safetensors file"):
        pieces_of([damaged])
    os.truncate(tmp_path / "ours.safetensors", size - 1)
    with pytest.raises(ValueError, match="ends too early"):
        [read_piece(piece) for pieces in pieces_of([tmp_path / "ours.safetensors"]).values() for piece in pieces]

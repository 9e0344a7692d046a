"""Checkpoints: every crash point, lost writes, full disks, damage, retention, bit-exact resume, export.

Crashes are enumerated: a save is run once to count its durable operations, then once for each of them with the
process "killed" before it. Killed means a BaseException that no handler in the product may catch, after which the disk
is put into the worst state a power cut allows: whatever was not fsynced is gone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asyncrl.errors import CheckpointError
from asyncrl.storage import checkpoint_files, model_files
from asyncrl.storage.checkpoint_files import (
    LATEST,
    MANIFEST,
    find_latest,
    load_desk_state,
    read_manifest,
    write_checkpoint,
)
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.engines.export import export_model
from asyncrl.trainer.engines.policy import Policy
from tests.tolerances import assert_near
from tests.trainer.test_step import make_trainer, weights_of
from tests.trainer.tiny import random_groups, save_tiny_model, tiny_policy
from tests.warm_processes import run_warm

pytestmark = pytest.mark.bits


class Killed(BaseException):
    """kill -9 at this instant."""


def two_files(content: bytes):
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "optimizer").write_bytes(content * 2)

    return write


def save(root, version, content=b"x" * 1000, **kwargs):
    return write_checkpoint(root, version, two_files(content), run_epoch=1, desk_state=b"desk %d" % version, **kwargs)


class Disk:
    """Counts the operations that make things durable, kills before the nth, and forgets what was not synced."""

    OPERATIONS = ("fsync", "rename", "replace", "mkdir")

    def __init__(self, monkeypatch, kill_at=None, error=None):
        self.count = 0
        self.kill_at = kill_at
        self.error = error or Killed()
        self.synced: set[int] = set()  # inodes
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, real):
        def operation(*args, **kwargs):
            self.count += 1
            if self.count == self.kill_at:
                raise self.error
            result = real(*args, **kwargs)
            if name == "fsync":
                self.synced.add(os.fstat(args[0]).st_ino)
            return result

        return operation

    def lose_unsynced_writes(self, root: Path, old_inodes: set[int]) -> None:
        """Files written since, but never fsynced, lose their second half."""
        for path in root.rglob("*"):
            inode = path.stat().st_ino
            if path.is_file() and inode not in self.synced | old_inodes:
                os.truncate(path, path.stat().st_size // 2)


def inodes(root: Path) -> set[int]:
    return {path.stat().st_ino for path in root.rglob("*")}


def count_operations(tmp_path, action) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        action(tmp_path)
        return disk.count


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power-cut"])
@pytest.mark.parametrize("same_version", [False, True], ids=["next-version", "same-version-again"])
def test_a_crash_at_any_point_leaves_a_newest_checkpoint_that_verifies(tmp_path, power_cut, same_version):
    new = 1 if same_version else 2
    save(tmp_path / "count", 1)
    points = count_operations(tmp_path / "count", lambda root: save(root, new, b"y" * 1000))
    assert points > 8
    for point in range(1, points + 1):
        root = tmp_path / f"at{point}"
        save(root, 1)
        before = inodes(root)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, kill_at=point)
            with pytest.raises(Killed):
                save(root, new, b"y" * 1000)
        if power_cut:
            disk.lose_unsynced_writes(root, before)
        found = find_latest(root)
        assert found is not None, f"killed at {point} of {points}"
        content = (found.path / "weights").read_bytes()
        assert content in (b"x" * 1000, b"y" * 1000)
        assert found.version in (1, new)
        # `latest` never names something that does not verify, but for a folder stepping aside for its own successor.
        named = root / (root / LATEST).read_text().strip()
        assert same_version or read_manifest(named).version in (1, new)
        # And the next save works as if nothing had happened, leaving no debris.
        again = save(root, 3, b"z" * 1000)
        assert find_latest(root).path == again.path
        assert not list(root.glob("*.tmp-*"))


def test_a_crash_at_any_point_of_the_first_save_leaves_nothing_or_a_whole_one(tmp_path):
    points = count_operations(tmp_path / "count", lambda root: save(root, 1))
    outcomes = set()
    for point in range(1, points + 1):
        root = tmp_path / f"at{point}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, kill_at=point)
            with pytest.raises(Killed):
                save(root, 1)
        if root.exists():
            disk.lose_unsynced_writes(root, set())
        found = find_latest(root)
        outcomes.add(found is not None)
    assert outcomes == {True, False}


def test_an_error_at_any_point_is_a_checkpoint_error_and_older_ones_stay(tmp_path):
    save(tmp_path / "count", 1)
    points = count_operations(tmp_path / "count", lambda root: save(root, 2))
    for point in range(2, points + 1):  # the first makes the root folder, which is there already
        root = tmp_path / f"at{point}"
        save(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, kill_at=point, error=OSError(28, "No space left on device"))
            with pytest.raises(CheckpointError, match="version 2.*No space left"):
                save(root, 2)
        assert read_manifest(root / "step_1").version == 1
        assert find_latest(root) is not None
        assert not list(root.glob("*.tmp-*"))


def test_files_are_on_disk_before_the_rename_and_the_rename_before_latest(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").split("/")[-1].split(".tmp-")[0]))
        real_fsync(descriptor)

    def rename(source, target):
        events.append(("rename", Path(target).name))
        real_rename(source, target)

    def replace(source, target):
        events.append(("replace", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path / "root", 4)
    renamed = events.index(("rename", "step_4"))
    before = [name for kind, name in events[:renamed] if kind == "sync"]
    assert before[0] == tmp_path.name, "the folder that names the root"
    assert set(before[1:]) == {"weights", "optimizer", "desk_state.bin", MANIFEST, "deep", "step_4"}
    assert before[-1] == "step_4"
    assert events[renamed + 1 :] == [
        ("sync", "root"),
        ("sync", "latest.tmp"),
        ("replace", "latest"),
        ("sync", "root"),
    ]


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "No space"), ValueError("x")])
def test_whatever_the_writer_raises_is_a_checkpoint_error(tmp_path, error):
    save(tmp_path, 1)

    def broken(folder):
        (folder / "half").write_bytes(b"h")
        raise error

    with pytest.raises(CheckpointError, match="earlier checkpoints are untouched") as caught:
        write_checkpoint(tmp_path, 2, broken, run_epoch=1)
    assert caught.value.__cause__ is error
    assert [path.name for path in sorted(tmp_path.iterdir())] == [LATEST, "step_1"]


def test_a_disk_that_is_nearly_full_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    first = save(tmp_path, 1, b"x" * 100_000)
    assert first.num_bytes > 300_000

    def usage(path):
        return shutil._ntuple_diskusage(10**9, 10**9 - 350_000, 350_000)

    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", usage)
    with pytest.raises(CheckpointError, match=r"0 MiB free, a checkpoint needs 0 MiB \(1.2 x its size\)"):
        save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="free some space"):
        save(tmp_path / "fresh", 1, expected_bytes=10**6)
    assert find_latest(tmp_path).version == 1


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
from tests.trainer.test_step import make_trainer
from tests.trainer.tiny import random_groups
from asyncrl.errors import CheckpointError
from asyncrl.trainer.checkpoint import save_checkpoint, load_checkpoint

torch.set_num_threads(1)
root, trainer = Path(sys.argv[1]), make_trainer()
trainer.step(random_groups(2, 4))
path = save_checkpoint(root, trainer, run_epoch=1)
size = (path / "trainer" / "optimizer" / "rank_00001_of_00001.safetensors").stat().st_size
trainer.step(random_groups(2, 4))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (10, size // 2, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(root, trainer, run_epoch=1)
    except CheckpointError as error:
        print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("left:", sorted(path.name for path in root.iterdir()))
print("restored:", load_checkpoint(root, make_trainer()).version)
print("then:", save_checkpoint(root, trainer, run_epoch=1).name)
"""


def test_files_cut_short_by_the_system_leave_the_older_checkpoint(tmp_path):
    """A real limit on file size, met in the middle of a write."""
    root = str(Path(__file__).parents[2])
    done = run_warm([sys.executable, "-c", LIMITED, str(tmp_path / "root"), root], timeout_s=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["refused"] * 3 + ["left", "restored", "then"]
    assert lines[3:] == ["left: ['latest', 'step_1']", "restored: 1", "then: step_2"]


def test_a_full_tmpfs_leaves_the_older_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, timeout=30
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        root = disk / "root"
        save(root, 1, b"x" * 100_000)
        ballast = disk / "ballast"
        # Room for the pre-flight check (1.2 x 300 kB), but not for what is then written.
        ballast.write_bytes(b"b" * (shutil.disk_usage(disk).free - 400_000))
        with pytest.raises(CheckpointError, match="No space left"):
            save(root, 2, b"y" * 200_000)
        assert find_latest(root).version == 1
        assert not list(root.glob("*.tmp-*"))
        ballast.unlink()
        assert save(root, 2).version == find_latest(root).version == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)


def test_the_newest_that_verifies_is_found_and_others_are_skipped_aloud(tmp_path, caplog):
    for version in (9, 10, 11):
        save(tmp_path, version, keep=9)
    (tmp_path / "step_12.tmp-00ff").mkdir()
    (tmp_path / "step_13").mkdir()
    with (tmp_path / "step_11" / "deep" / "optimizer").open("r+b") as file:
        file.seek(500)
        file.write(b"!")
    found = find_latest(tmp_path)
    assert found is not None
    assert found.version == 10  # by number, not by name: step_9 sorts behind step_10
    assert load_desk_state(found) == b"desk 10"
    assert "step_11/deep/optimizer does not match its digest" in caplog.text
    assert "step_13: the manifest cannot be read" in caplog.text


def damage_truncate(path):
    os.truncate(path / "weights", 10)


def damage_remove(path):
    (path / "deep" / "optimizer").unlink()


def damage_desk_state(path):
    (path / "desk_state.bin").write_bytes(b"desk 9")


def damage_manifest_cut(path):
    os.truncate(path / MANIFEST, 50)


def damage_manifest_field(path):
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"version": 1', '"version": 7'))


def damage_manifest_type(path):
    (path / MANIFEST).write_text("[]")


def damage_escape(path):
    fields = json.loads((path / MANIFEST).read_text())
    del fields["manifest_sha256"]
    fields["files"]["../outside"] = [1, "00"]
    fields["manifest_sha256"] = checkpoint_files._digest_of(fields)
    (path / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate, damage_remove, damage_desk_state, damage_manifest_cut,
        damage_manifest_field, damage_manifest_type, damage_escape,
    ],
)  # fmt: skip
def test_any_damage_is_noticed(tmp_path, damage):
    save(tmp_path, 1)
    assert find_latest(tmp_path) is not None
    damage(tmp_path / "step_1")
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path / "step_1")
    assert find_latest(tmp_path) is None


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="manifest cannot be read"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept_and_only_after_the_newer_verified(tmp_path, keep, monkeypatch):
    for version in range(1, 6):
        save(tmp_path, version, keep=keep)
        kept = sorted(path.name for path in tmp_path.glob("step_*"))
        assert kept == [f"step_{v}" for v in range(max(1, version - keep + 1), version + 1)]
    monkeypatch.setattr(checkpoint_files, "_verify_file", lambda *_: (_ for _ in ()).throw(CheckpointError("bad")))
    with pytest.raises(CheckpointError, match="bad"):
        save(tmp_path, 6, keep=keep)
    assert set(kept) <= {path.name for path in tmp_path.glob("step_*")}


def test_the_desk_reads_checkpoints_without_torch(tmp_path):
    save(tmp_path, 3)
    code = (
        "import sys; from pathlib import Path\n"
        "from asyncrl.storage.checkpoint_files import find_latest, load_desk_state\n"
        f"assert load_desk_state(find_latest(Path({str(tmp_path)!r}))) == b'desk 3'\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def batches():
    return [random_groups(3, 4, seed=seed) for seed in range(6)]


def test_training_resumes_bit_for_bit(tmp_path):
    straight = make_trainer(lr_warmup_steps=4, weight_decay=0.1)
    expected = [straight.step(groups).metrics for groups in batches()]
    first = make_trainer(lr_warmup_steps=4, weight_decay=0.1)
    for groups in batches()[:3]:
        first.step(groups)
    path = save_checkpoint(tmp_path, first, run_epoch=7, desk_state=b"frontier")
    assert path == tmp_path / "step_3"
    second = make_trainer(tiny_policy(seed=5), lr_warmup_steps=4, weight_decay=0.1)
    torch.manual_seed(123)
    restored = load_checkpoint(tmp_path, second)
    assert restored is not None
    assert (restored.version, restored.run_epoch, restored.desk_state) == (3, 7, b"frontier")
    assert second.version == 3
    got = [second.step(groups).metrics for groups in batches()[3:]]
    assert got == expected[3:]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(straight), weights_of(second), strict=True))


def test_a_checkpoint_leaves_the_trainer_as_it_was(tmp_path):
    watched, alone = make_trainer(), make_trainer()
    for groups in batches()[:2]:
        watched.step(groups)
        alone.step(groups)
        save_checkpoint(tmp_path, watched, run_epoch=1)
    assert watched.step(batches()[2]).metrics == alone.step(batches()[2]).metrics


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    trainer = make_trainer()
    before = weights_of(trainer)
    assert load_checkpoint(tmp_path, trainer) is None
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path):
    save_checkpoint(tmp_path, make_trainer(tiny_policy(layers=1)), run_epoch=1)
    trainer = make_trainer()
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match="is of model .* the trainer holds"):
        load_checkpoint(tmp_path, trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer), strict=True))


def test_a_checkpoint_with_code_in_it_is_refused_not_run(tmp_path):
    trainer = make_trainer()
    path = save_checkpoint(tmp_path, trainer, run_epoch=1)

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    def write(folder):
        shutil.copyfile(path / "model.safetensors", folder / "weights.safetensors")
        torch.save({"optimizer": Payload()}, folder / "trainer.pt")

    extra = read_manifest(path).extra
    write_checkpoint(tmp_path, 1, write, run_epoch=1, extra=extra)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(tmp_path, trainer)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.numeric
def test_the_export_loads_as_a_hugging_face_model_with_the_same_log_probs(tmp_path, tied):
    folder = save_tiny_model(tmp_path / "model", tied=tied)
    (folder / "special_tokens_map.json").write_text("{}")
    policy = Policy.load(str(folder))
    make_trainer(policy).step(random_groups(3, 4))
    for _ in range(2):  # the second replaces the first
        export_model(policy, folder, tmp_path / "export")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"} <= names
    assert [path.name for path in tmp_path.glob("export*")] == ["export"]
    loaded = Policy.load(str(tmp_path / "export"))
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.model.state_dict().items())
    sequences = [[1, 2, 3, 4], [5, 6, 7]]
    for ours, theirs in zip(policy.score(sequences), loaded.score(sequences), strict=True):
        assert_near(ours, theirs)  # the bits of a product may depend on where in memory its factors lie


def test_an_export_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    policy = Policy.load(str(save_tiny_model(tmp_path / "model")))
    export_model(policy, None, tmp_path / "export")

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files, "write_tensors", broken)
    with pytest.raises(CheckpointError, match="No space left"):
        export_model(policy, None, tmp_path / "export")
    assert Policy.load(str(tmp_path / "export")).score([[1, 2]])
    assert [path.name for path in tmp_path.glob("export*")] == ["export"]

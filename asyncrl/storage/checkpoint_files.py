"""Atomic checkpoint folders: write, verify, find, keep the newest. No torch here: the desk reads them too.

    <root>/step_120/              a complete checkpoint of version 120: renamed into place, never written into
        MANIFEST.json             sizes and sha256 of every other file, written last
        desk_state.bin            the desk's own state, opaque to everybody else
        config.json, model.safetensors, tokenizer.json, ...    the policy as a Hugging Face model; without its weights
                                  where several ranks train it: they are below trainer/ then, in shards
        adapter/                  with update.what=lora: the adapters alone, in PEFT's format
        trainer/                  the rest of the trainer's state
    <root>/step_140.tmp-3f.../    under construction, or left by a crash; never read, removed by the next save
    <root>/step_120.old-9c.../    replaced while step_120 was saved again; read only if that save crashed
    <root>/latest                 the newest folder's name, for people; resuming looks at the manifests

Order of a save, each item durable before the next: files, MANIFEST.json, the temporary folder, rename, the root folder,
`latest`. A crash anywhere leaves either no trace that a reader would look at, or a checkpoint that verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyncrl.errors import CheckpointError
from asyncrl.storage.disk import make_durable, make_folder
from asyncrl.storage.tensor_files import FileProof

log = logging.getLogger(__name__)

FORMAT = 2
READABLE = (1, 2)  # 1: the optimizer's state by number, written by torch.save
MANIFEST = "MANIFEST.json"
DESK_STATE = "desk_state.bin"
WEIGHTS_ONLY = "weights_only"  # in `Manifest.extra`: a new run begins with these weights, and with nothing else of it
LATEST = "latest"
ADAPTER_FOLDER = "adapter"
STATE_FOLDER = "trainer"
WEIGHT_SHARDS = "weights"  # below that, where several ranks train: what training changes of the policy
# PEFT's names in an adapter's folder, and ours for the halves of an adapter of X.weight.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"
HEADROOM = 1.2  # free space wanted, as a multiple of the previous checkpoint
_HASH_BLOCK_BYTES = 2**22
_COMPLETE = re.compile(r"step_(\d+)(\.old-[0-9a-f]+)?")
_INCOMPLETE = re.compile(r"step_\d+\.tmp-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says about itself. `extra` holds what its writer adds, as JSON values."""

    path: Path
    version: int
    run_epoch: int
    created: float  # Unix time
    files: dict[str, FileProof]  # by relative path
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(size for size, _ in self.files.values())


def write_checkpoint(
    root: Path,
    version: int,
    write_files: Callable[[Path], Mapping[str, FileProof] | None],
    *,
    run_epoch: int,
    desk_state: bytes = b"",
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    expected_bytes: int = 0,
) -> Manifest:
    """Saves version `version` under `root` and keeps the newest `keep` checkpoints.

    write_files     puts the trainer's files into the folder it is given; returns size and digest of those that it knows
                    by their paths below it, the others are read back
    expected_bytes  size to check free space against when there is no earlier checkpoint to go by

    Raises CheckpointError whatever went wrong, disk full included; checkpoints that were there before are
    still there, and nothing half-written is left. Older ones are deleted only after this one verified.
    """
    assert keep >= 1, keep
    tmp = root / f"step_{version}.tmp-{uuid.uuid4().hex}"
    try:
        make_folder(root)  # durably: what is in a folder that is gone after a power loss was saved in vain
        _remove_leftovers(root)
        _check_free_space(root, expected_bytes)
        tmp.mkdir()
        proofs = write_files(tmp) or {}
        (tmp / DESK_STATE).write_bytes(desk_state)
        _write_manifest(tmp, version, run_epoch, extra or {}, proofs)
        _fsync_tree(tmp)
        final = _move_into_place(tmp, root / f"step_{version}")
        manifest = read_manifest(final, max_bytes=0)  # sizes: the bytes were hashed on their way to the disk
        _point_latest(root, final.name)
    except Exception as error:
        # Not OSError alone: torch.save on a full disk raises RuntimeError, other writers their own classes.
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"checkpoint of version {version} under {root} failed: {type(error).__name__}: {error};"
            " earlier checkpoints are untouched"
        ) from error
    _delete_older(root, manifest, keep)
    return manifest


def read_manifest(
    path: Path, *, verify: bool = True, max_bytes: int | None = None, share: tuple[int, int] = (0, 1)
) -> Manifest:
    """The manifest of the checkpoint folder `path`. With `verify`, every file is read and compared with its digest.

    max_bytes  of larger files the size alone is compared; None: all are read
    share      (number, count) of those who divide the reading among them; sizes are compared by each

    Raises CheckpointError when the manifest is missing or damaged, or a file is missing, short or changed.
    """
    try:
        fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = fields.pop("manifest_sha256")
        if digest != _digest_of(fields):
            raise CheckpointError(f"{path / MANIFEST} does not match its own digest")
        if fields["format"] not in READABLE:
            raise CheckpointError(f"{path} has format {fields['format']}, this version reads up to {FORMAT}")
        manifest = Manifest(
            path=path,
            version=int(fields["version"]),
            run_epoch=int(fields["run_epoch"]),
            created=float(fields["created"]),
            files={name: (int(size), str(sha)) for name, (size, sha) in fields["files"].items()},
            extra=dict(fields["extra"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest cannot be read ({type(error).__name__}: {error})") from error
    if verify:
        number, count = share
        for position, (name, (size, sha)) in enumerate(sorted(manifest.files.items())):
            is_read = (max_bytes is None or size <= max_bytes) and position % count == number
            _verify_file(path, name, size, sha if is_read else "")
    return manifest


def find_latest(root: Path, *, max_bytes: int | None = None) -> Manifest | None:
    """The checkpoint of the highest version that verifies; None if there is none. Others are skipped, and logged.

    Of files over max_bytes the size alone is looked at; None: every file is read.
    """
    for path in complete_folders(root):
        try:
            return read_manifest(path, max_bytes=max_bytes)
        except CheckpointError as error:
            log.warning("skipping a checkpoint that does not verify: %s", error)
    return None


def is_empty(root: Path) -> bool:
    """Whether there is no checkpoint under `root`, not even a damaged one."""
    return not complete_folders(root)


def unreadable(root: Path) -> str:
    """What to say when checkpoints are there and none of them verifies."""
    names = ", ".join(path.name for path in complete_folders(root))
    return (
        f"none of the checkpoints in {root} can be read ({names}; the warnings above say why). Each is complete by "
        "itself: restore one of them. To begin the run anew from model.path, set checkpoint.resume=fresh; what is in "
        "the run folder is then kept in its folder `earlier`"
    )


def newest_run_epoch(root: Path) -> int:
    """The highest run epoch that a readable manifest under `root` names; 0 if there is none."""
    epochs = [0]
    for path in complete_folders(root):
        with contextlib.suppress(CheckpointError):
            epochs.append(read_manifest(path, verify=False).run_epoch)
    return max(epochs)


def oldest_version(root: Path) -> int | None:
    """The oldest version under `root` that a recovery might fall back to; None if there is none."""
    return min((_version_of(path) for path in complete_folders(root)), default=None)


def load_desk_state(manifest: Manifest) -> bytes:
    """The desk's state out of a checkpoint. Raises CheckpointError when it cannot be read or has changed."""
    try:
        content = (manifest.path / DESK_STATE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{manifest.path / DESK_STATE} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != manifest.files.get(DESK_STATE, (0, ""))[1]:
        raise CheckpointError(f"{manifest.path / DESK_STATE} does not match its digest")
    return content


def write_folder_atomically(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Fills `folder` by way of a temporary one beside it; an existing folder is replaced.

    Raises CheckpointError, whatever went wrong; what was there before stays.
    """
    tmp = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    try:
        make_folder(folder.parent)
        tmp.mkdir()
        write_files(tmp)
        _fsync_tree(tmp)
        _move_into_place(tmp, folder)
        _remove_replaced(folder)
    except Exception as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise CheckpointError(f"writing {folder} failed: {type(error).__name__}: {error}") from error


def _write_manifest(
    folder: Path, version: int, run_epoch: int, extra: dict[str, Any], proofs: Mapping[str, FileProof]
) -> None:
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if missing := sorted(proofs.keys() - found.keys()):
        raise CheckpointError(f"{folder}: {missing[0]} was written and is not there; do all ranks share this folder?")
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "run_epoch": run_epoch,
        "created": time.time(),
        "files": {
            name: list(proofs[name]) if name in proofs else [path.stat().st_size, _sha256(path)]
            for name, path in found.items()
        },
        "extra": extra,
    }
    fields["manifest_sha256"] = _digest_of(fields)
    (folder / MANIFEST).write_text(json.dumps(fields, indent=1, sort_keys=True), encoding="utf-8")


def _digest_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _move_into_place(tmp: Path, final: Path) -> Path:
    """Renames tmp to final and makes that durable. What was at `final` steps aside first, still complete."""
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.old-{uuid.uuid4().hex}"))
    os.rename(tmp, final)
    make_durable(final.parent)
    return final


def _point_latest(root: Path, name: str) -> None:
    tmp = root / f"{LATEST}.tmp"
    tmp.write_text(name + "\n", encoding="utf-8")
    make_durable(tmp)
    os.replace(tmp, root / LATEST)
    make_durable(root)


def _delete_older(root: Path, newest: Manifest, keep: int) -> None:
    """Deletes all but `keep` checkpoints that verify, and what the newest replaced.

    The save succeeded even if this fails. While fewer than `keep` verify, damaged ones stay as well: there is no hurry,
    and people may want to look at them.
    """
    _note_verified(newest.path)
    folders = [path for path in complete_folders(root) if path != newest.path]
    # Versions above the newest did not verify when the run resumed; they stay for people to look at.
    older = [path for path in folders if ".old-" not in path.name and _version_of(path) < newest.version]
    kept: list[Path] = []
    for path in older:
        if len(kept) < keep - 1 and _verifies(path):
            kept.append(path)
    enough = len(kept) == keep - 1
    for path in folders:
        if path in kept or _version_of(path) > newest.version or (path in older and not enough):
            continue
        try:
            # A half-deleted folder must not look like a damaged checkpoint, so its manifest goes first.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not delete the old checkpoint %s: %s", path, error)


# What this process verified, by folder: size and time of change of its files. A save must not read older ones again.
_verified: dict[Path, dict[str, tuple[int, int]]] = {}


def _verifies(path: Path) -> bool:
    """Whether a checkpoint verifies; one whose files are as they were when it did is not read again."""
    try:
        if _verified.get(path) == _signature(path):
            return True
        read_manifest(path)
    except (OSError, CheckpointError) as error:
        log.warning("the older checkpoint %s does not verify, and is not counted: %s", path, error)
        return False
    _note_verified(path)
    return True


def _note_verified(path: Path) -> None:
    with contextlib.suppress(OSError):
        _verified[path] = _signature(path)


def _signature(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {file.relative_to(folder).as_posix(): file.stat() for file in _files(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _remove_leftovers(root: Path) -> None:
    for path in root.iterdir():
        if _INCOMPLETE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _remove_replaced(folder: Path) -> None:
    for path in folder.parent.glob(f"{folder.name}.old-*"):
        shutil.rmtree(path, ignore_errors=True)


def _check_free_space(root: Path, expected_bytes: int) -> None:
    previous = _last_size(root)
    needed = int(HEADROOM * (expected_bytes if previous is None else previous))
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root} has {free / 2**20:.0f} MiB free, a checkpoint needs {needed / 2**20:.0f} MiB"
            f" ({HEADROOM} x its size); free some space, or lower checkpoint.keep"
        )


def _last_size(root: Path) -> int | None:
    for path in complete_folders(root):
        try:
            return read_manifest(path, verify=False).num_bytes
        except CheckpointError:
            continue
    return None


def complete_folders(root: Path) -> list[Path]:
    """Folders that were renamed into place, highest version first; one that was replaced is behind what replaced it."""
    if not root.is_dir():
        return []
    paths = [path for path in root.iterdir() if _COMPLETE.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (-_version_of(path), ".old-" in path.name, path.name))


def _version_of(path: Path) -> int:
    match = _COMPLETE.fullmatch(path.name)
    assert match is not None, path
    return int(match.group(1))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _verify_file(folder: Path, name: str, size: int, sha: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: the manifest names {name!r}, outside the checkpoint")
    try:
        actual = path.stat().st_size
        if actual != size:
            raise CheckpointError(f"{path} has {actual} bytes, its manifest says {size}")
        if sha and _sha256(path) != sha:
            raise CheckpointError(f"{path} does not match its digest")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _fsync_tree(folder: Path) -> None:
    """Files first, then the folders that name them, innermost first."""
    for path in _files(folder):
        make_durable(path)
    folders = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in [*folders, folder]:
        make_durable(path)

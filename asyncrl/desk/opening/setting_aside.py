"""Sets a run aside that cannot be gone on with, so that a new one begins in its folder. Nothing is deleted.

    run_dir/earlier/1/   journal, checkpoints, metrics, ... of the run before; 2, 3, ... of those after
    run_dir/generators/  stays: its files count the starts of generators, which go on

The new run's run epoch is 1 again. Generators of the old run, which knew a higher one, are refused until they are
started again: versions of the two runs must not be mixed up.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from asyncrl.desk.opening.saved_state import SavedDesk
from asyncrl.errors import CheckpointError
from asyncrl.replay.lease_records import SavedLeases
from asyncrl.storage.checkpoint_files import (
    DESK_STATE,
    WEIGHTS_ONLY,
    Manifest,
    find_latest,
    unreadable,
    write_checkpoint,
)
from asyncrl.storage.disk import fsync_folder, make_folder
from asyncrl.storage.tensor_files import FileProof
from asyncrl.types import Frontier

EARLIER = "earlier"
FORKED = "checkpoints.forked"  # complete, and renamed to `checkpoints` once the old run is out of the way
FORKED_FROM = "forked_from"  # in `Manifest.extra`: where the weights are from
STAYS = frozenset({EARLIER, "generators", FORKED})


def set_aside(run_dir: Path, *, fork: bool) -> Path:
    """Moves the run to a folder below `earlier`, which is returned.

    fork puts a checkpoint of version 0 in place, which holds the newest checkpoint's weights. A crash in between leaves
    what `complete_fork` completes. Raises CheckpointError when there is no checkpoint to fork from.
    """
    earlier = run_dir / EARLIER
    kept = earlier / str(
        1 + max((int(path.name) for path in earlier.glob("[0-9]*") if path.name.isdecimal()), default=0)
    )
    if fork:
        manifest = find_latest(run_dir / "checkpoints")
        if manifest is None:
            raise CheckpointError(
                f"checkpoint.resume=fork needs a checkpoint to begin from; {unreadable(run_dir / 'checkpoints')}"
            )
        _write_fork(run_dir / FORKED, manifest)
    make_folder(kept)
    # The checkpoints last: as long as they are there without their journal, the run is refused, not begun anew.
    names = sorted(
        (path.name for path in run_dir.iterdir() if path.name not in STAYS), key=lambda n: n == "checkpoints"
    )
    for name in names:
        os.rename(run_dir / name, kept / name)
    fsync_folder(kept)
    fsync_folder(run_dir)
    complete_fork(run_dir)
    return kept


def forget_fork(run_dir: Path) -> None:
    """Removes what a fork left that was given up half-way: the run goes on as it was. Raises OSError."""
    if (forked := run_dir / FORKED).is_dir():
        shutil.rmtree(forked)


def complete_fork(run_dir: Path) -> None:
    """Puts a forked checkpoint in place, unless the run that it was made of is still there."""
    forked, checkpoints = run_dir / FORKED, run_dir / "checkpoints"
    if forked.is_dir() and not checkpoints.exists():
        os.rename(forked, checkpoints)
        fsync_folder(run_dir)


def _write_fork(root: Path, manifest: Manifest) -> None:
    def link_files(folder: Path) -> dict[str, FileProof]:
        proofs = {name: proof for name, proof in manifest.files.items() if name != DESK_STATE}
        for name in proofs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(manifest.path / name, folder / name)
        return proofs

    write_checkpoint(
        root,
        0,
        link_files,
        run_epoch=0,
        desk_state=SavedDesk(SavedLeases(0, 0, Frontier(), [], 0, {})).encode(),
        extra=manifest.extra | {WEIGHTS_ONLY: True, FORKED_FROM: f"{manifest.path.name} of the run before"},
    )

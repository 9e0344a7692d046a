"""The file system of the checkpoints fills up in mid-run. Needs permission to mount a small one."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.daemons import START_S, STEP_S, wait_until

pytestmark = pytest.mark.slow

STEPS = 24
SIZE = 8 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, timeout=20).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def test_training_goes_on_when_a_checkpoint_cannot_be_written_and_older_ones_stay(make_run, small_disk):
    run = make_run().configure(
        run={"steps": STEPS}, task={"args": {"delay_s": 0.03}}, checkpoint={"every": 2, "keep": 1}, eval={"prompts": 0}
    )
    run.run_dir.mkdir()
    checkpoints = run.run_dir / "checkpoints"
    checkpoints.symlink_to(small_disk, target_is_directory=True)
    learner, generator = run.learner(), run.generator()
    learner.wait_for_log("checkpoint of version", START_S)

    filler = small_disk / "filler"
    fill(filler)
    learner.wait_for_log("failed, training goes on")
    failed_at = run.version()
    kept = (small_disk / "latest").read_text().strip()
    run.wait_for_version(failed_at + 3, learner, generator)
    manifest = json.loads((small_disk / kept / "MANIFEST.json").read_text())
    assert manifest["version"] <= failed_at
    assert re.search(r"failed, training goes on: .*MiB free", learner.stderr)

    filler.unlink()
    assert learner.exit_code(STEP_S) == 0
    assert generator.exit_code() == 0
    last = (small_disk / "latest").read_text().strip()
    assert json.loads((small_disk / last / "MANIFEST.json").read_text())["version"] == STEPS
    wait_until(lambda: not run.processes(), 10.0, "no process of the run")


def test_a_last_checkpoint_that_cannot_be_written_is_no_success(make_run, small_disk):
    run = make_run().configure(
        run={"steps": 8}, task={"args": {"delay_s": 0.03}}, checkpoint={"every": 2, "keep": 1}, eval={"prompts": 0}
    )
    run.run_dir.mkdir()
    (run.run_dir / "checkpoints").symlink_to(small_disk, target_is_directory=True)
    learner, generator = run.learner(), run.generator()
    learner.wait_for_log("checkpoint of version", START_S)
    fill(small_disk / "filler")
    assert learner.exit_code(STEP_S) == 6
    assert re.search(r"asyncrl-learner: .*MiB free", learner.stderr), learner.last_words()
    assert generator.exit_code() == 0
    assert (run.run_dir / "export" / "config.json").is_file(), "the other disk had room"


def fill(path: Path) -> None:
    """Takes all the space that is left."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue

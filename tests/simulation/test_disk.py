"""The disk that forgets, and what the files of a run are worth on it."""

from __future__ import annotations

import contextlib
import os
import random

import pytest

from asyncrl.storage.checkpoint_files import find_latest, write_checkpoint
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import PromptGivenUp
from asyncrl.storage.run_epoch import next_run_epoch, run_epoch_of
from tests.simulation.disk import Disk


def disk_at(folder, seed) -> Disk:
    return Disk(folder, random.Random(seed), lambda when: None)


def test_what_was_not_synced_may_be_gone_in_whole_or_in_part_and_what_was_stays(tmp_path):
    outcomes = set()
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        disk = disk_at(folder, seed)
        with disk.attached(), (folder / "file").open("wb", buffering=0) as file:
            file.write(b"safe")
            os.fsync(file.fileno())
            folder_fd = os.open(folder, os.O_RDONLY)
            os.fsync(folder_fd)
            os.close(folder_fd)
            file.write(b"and not")
        (folder / "new").write_bytes(b"x")
        disk.lose_power()
        assert (folder / "file").read_bytes().startswith(b"safe")
        outcomes.add(((folder / "file").read_bytes(), (folder / "new").exists()))
    assert {(b"safe", False), (b"safeand not", True)} < outcomes
    assert any(b"safe" < content < b"safeand not" for content, _ in outcomes)


def test_the_first_checkpoint_of_a_run_survives_a_loss_of_power(tmp_path):
    """Its folder is new, and so is the folder around it: both names must be durable."""
    for seed in range(20):
        run_dir = tmp_path / str(seed)
        run_dir.mkdir()
        disk = disk_at(run_dir, seed)
        with disk.attached():
            write_checkpoint(
                run_dir / "checkpoints", 3, lambda tmp: (tmp / "w").write_bytes(b"1") and None, run_epoch=1
            )
        disk.lose_power()
        manifest = find_latest(run_dir / "checkpoints")
        assert manifest is not None, f"seed {seed}"
        assert manifest.version == 3


def test_a_run_epoch_is_never_given_out_twice(tmp_path):
    for seed in range(20):
        run_dir = tmp_path / str(seed)
        run_dir.mkdir()
        disk = disk_at(run_dir, seed)
        for epoch in (1, 2, 3):
            with disk.attached():
                assert next_run_epoch(run_dir) == epoch
            disk.lose_power()
        assert run_epoch_of(run_dir) == 3


class Killed(BaseException):
    """SIGKILL in the middle of a call."""


def test_what_a_journal_reads_at_its_opening_is_durable_from_then_on(tmp_path):
    """A killed learner may leave records in the page cache: the next one acknowledges and trains them."""
    for seed in range(20):
        folder = tmp_path / str(seed) / "journal"
        folder.parent.mkdir()
        disk = disk_at(folder.parent, seed)

        def killed(fd: int) -> None:
            raise Killed

        with disk.attached():
            journal = Journal.open(folder, flush=killed)
            journal.append(PromptGivenUp(7), 0.0)
            with contextlib.suppress(Killed):
                journal.make_durable()
            journal.close()
            again = Journal.open(folder, flush=disk.sync)
            assert [entry.record for entry in again.read_all()] == [PromptGivenUp(7)]
            again.close()
        disk.lose_power()
        with disk.attached():
            last = Journal.open(folder, flush=disk.sync)
            assert [entry.record for entry in last.read_all()] == [PromptGivenUp(7)], f"seed {seed}"
            last.close()


@pytest.mark.parametrize("moment", range(1, 13))
def test_a_journal_whose_learner_was_killed_while_it_began_keeps_what_the_next_one_acknowledges(tmp_path, moment):
    """Killed before or after any fsync of the opening: a file may be there whose name is in the page cache alone."""
    for seed in range(10):
        folder = tmp_path / str(seed) / "journal"
        folder.parent.mkdir()
        passed = [0]

        def dies(when: str, passed=passed) -> None:
            passed[0] += 1
            if passed[0] == moment:
                raise Killed

        disk = Disk(folder.parent, random.Random(seed), dies)
        with disk.attached():
            with contextlib.suppress(Killed):
                Journal.open(folder, flush=disk.sync).close()
            passed[0] = moment
            journal = Journal.open(folder, flush=disk.sync)
            journal.append(PromptGivenUp(1), 0.0)
            journal.make_durable()
            journal.close()
        disk.lose_power()
        with disk.attached():
            again = Journal.open(folder, flush=disk.sync)
            assert [entry.record for entry in again.read_all()] == [PromptGivenUp(1)], f"seed {seed}"
            again.close()

"""The daemon's end: it never waits, whatever becomes of the process that writes."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import numpy as np

from asyncrl.report.rollouts.files import files_in, read_file
from asyncrl.report.rollouts.jobs import JobEntry, RolloutJob, WriterSetup
from asyncrl.report.rollouts.writer import MAX_DEATHS, PROCESS, QUEUED_JOBS, RolloutWriter
from asyncrl.types import FinishReason, LeaseKind, Rollout, VersionSpan
from tests.model_folders import make_model_folder
from tests.report.rollouts.making import make_kept
from tests.waits import LATE_S, wait_until

STUCK = "tests.report.rollouts.stuck_process"
ENDS_AT_ONCE = "this"  # of the standard library


def setup(tmp_path, model_path=""):
    return WriterSetup(str(tmp_path / "rollouts"), str(model_path or tmp_path), 2**24)


def job(version=1, num_tokens=4):
    length = num_tokens
    rollout = Rollout(
        np.zeros(length, np.int32), np.zeros(length, np.float32), (VersionSpan(0, length, 0),), FinishReason.STOP, 1.0
    )
    return RolloutJob(LeaseKind.TRAIN, version, [JobEntry(make_kept(rollout=rollout, old_logprobs=None), "g", None)])


def test_what_was_taken_is_written_when_it_is_closed(tmp_path):
    model = make_model_folder(tmp_path / "model")
    writer = RolloutWriter(setup(tmp_path, model))
    for version in (1, 2, 3):
        writer.write(job(version))
    writer.close(60.0)
    files = files_in(tmp_path / "rollouts")
    assert [file.version for file in files] == [1, 2, 3]
    records, problems = read_file(files[0])
    assert problems == [] and records[0].token_texts is not None
    assert writer._process is None and not writer._thread.is_alive()


def test_nothing_is_started_before_there_is_something_to_write(tmp_path):
    writer = RolloutWriter(setup(tmp_path))
    writer.write(RolloutJob(LeaseKind.EVAL, 0, []))
    assert writer._thread is None
    writer.close()
    assert not (tmp_path / "rollouts").exists()


def test_a_process_that_does_not_answer_costs_rollouts_and_no_time(tmp_path, caplog):
    writer = RolloutWriter(setup(tmp_path), module=STUCK)
    large = job(num_tokens=100_000)  # more than a pipe takes
    with caplog.at_level(logging.WARNING):
        started = time.monotonic()
        for _ in range(QUEUED_JOBS + 20):
            writer.write(large)
        assert time.monotonic() - started < 1.0 + LATE_S, "to write must not wait"
        assert caplog.text.count("the writing of rollouts is behind") == 1
        wait_until(lambda: writer._process is not None, "the process")
        process = writer._process
        started = time.monotonic()
        writer.close(0.5)
        assert time.monotonic() - started < 10.0
    assert "not all rollouts are written" in caplog.text
    assert "files of rollouts were left out" in caplog.text
    assert process.wait(10.0) != 0
    assert not writer._thread.is_alive()


def test_a_process_that_is_lost_again_and_again_is_given_up_and_said(tmp_path, caplog):
    writer = RolloutWriter(setup(tmp_path), module=ENDS_AT_ONCE)

    def lost():
        writer.write(job(num_tokens=100_000))
        return writer.failed

    with caplog.at_level(logging.WARNING):
        wait_until(lost, "the end of the attempts", 60.0)
        wait_until(lambda: not writer._thread.is_alive(), "the end of the thread")
    assert caplog.text.count("it is started again") == MAX_DEATHS - 1
    assert caplog.text.count("no more rollouts are written") == 1
    writer.write(job())
    writer.close(1.0)


def test_a_process_that_cannot_be_started_ends_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    writer = RolloutWriter(setup(tmp_path))
    with caplog.at_level(logging.WARNING):
        writer.write(job())
        wait_until(lambda: writer.failed, "the end of the attempts")
    assert "the writing of rollouts cannot be started" in caplog.text
    writer.close(1.0)


def test_the_process_ends_with_its_pipe():
    process = subprocess.Popen([sys.executable, "-m", PROCESS], stdin=subprocess.DEVNULL)
    assert process.wait(60.0) == 0

"""What the writing process makes of a job: text of tokens, lines, files; and what a failure costs."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.report.rollouts.files import file_of, files_in, read_file
from asyncrl.report.rollouts.jobs import JobEntry, RolloutJob, WriterSetup, WrittenJob
from asyncrl.report.rollouts.writer_process import RolloutFiles
from asyncrl.types import FinishReason, LeaseKind, Rollout, VersionSpan
from tests.model_folders import make_model_folder
from tests.report.rollouts.making import make_kept
from tests.report.rollouts.test_files import small_files

TRAIN, EVAL = LeaseKind.TRAIN, LeaseKind.EVAL


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def files(tmp_path, model_folder):
    return RolloutFiles(WriterSetup(str(tmp_path / "run" / "rollouts"), str(model_folder), 2**20))


def write(files, version=5, *, kind=TRAIN, kept=None, generator="gen-a", payload=None):
    entries = [JobEntry(rollout, generator, payload) for rollout in kept or [make_kept()]]
    files.write(WrittenJob.decode(RolloutJob(kind, version, entries).encode()))


def read(files, version=5, kind=TRAIN):
    records, problems = read_file(file_of(files._folder, kind, version))
    assert problems == []
    return records


def test_a_setup_comes_back_from_its_bytes():
    setup = WriterSetup("a/folder", "a/model", 2**28, "debug")
    assert WriterSetup.decode(setup.encode()) == setup


def test_text_is_that_of_the_tokens_and_pieces_add_up_to_it(files, model_folder):
    tokenizer = load_tokenizer(str(model_folder))
    end = tokenizer.eos_token_id
    ids = [*tokenizer("12+3=", add_special_tokens=False)["input_ids"], end]
    spans = (VersionSpan(0, len(ids), 2),)
    rollout = Rollout(np.array(ids, np.int32), np.zeros(len(ids), np.float32), spans, FinishReason.LENGTH, 0.5)
    write(files, kept=[make_kept(rollout=rollout, old_logprobs=None)], payload={"answer": "15"})
    (record,) = read(files)
    assert record.completion == tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(record.token_texts) == tokenizer.decode(ids, skip_special_tokens=False)
    assert record.token_texts == [*"12+3=", "<end>"]
    assert record.prompt == tokenizer.decode([5, 6], skip_special_tokens=False)
    assert (record.generator, record.payload, record.truncated) == ("gen-a", {"answer": "15"}, True)


def test_a_rollout_that_the_trainer_sent_as_bytes_is_the_same(files):
    write(files, 1)
    entries = [JobEntry(make_kept().to_bytes(), "gen-a", None)]
    files.write(WrittenJob.decode(RolloutJob(TRAIN, 2, entries).encode()))
    first, second = (read(files, version)[0] for version in (1, 2))
    assert first == dataclasses.replace(second, version=1)


def test_a_step_made_again_replaces_its_file_and_an_evaluation_has_its_own(files):
    write(files, kept=[make_kept(1), make_kept(2)])
    write(files, kept=[make_kept(3)])
    write(files, kind=EVAL, kept=[make_kept(4)])
    assert [record.ordinal for record in read(files)] == [3]
    assert [record.ordinal for record in read(files, kind=EVAL)] == [4]


def test_a_tokenizer_that_fails_costs_the_text_alone_and_is_said_once(tmp_path, caplog):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    files = RolloutFiles(WriterSetup(str(tmp_path / "rollouts"), str(tmp_path), 2**20))
    with caplog.at_level(logging.WARNING):
        write(files, 1)
        write(files, 2)
    for version in (1, 2):
        (record,) = read(files, version)
        assert (record.prompt, record.completion, record.token_texts) == (None, None, None)
        assert record.token_ids == [2, 3, 4, 5]
    assert caplog.text.count("rollouts are written without their text") == 1


def test_a_full_disk_costs_the_file_and_is_said_once_until_there_is_room_again(files, caplog):
    write(files, 1, kept=[make_kept()])
    large = [make_kept(number, num_tokens=40) for number in range(20)]
    with caplog.at_level(logging.WARNING):
        with small_files(8192):
            write(files, 2, kept=large)
            write(files, 3, kept=large)
        assert caplog.text.count("rollouts cannot be written") == 1
        write(files, 4, kept=large)
        assert len(read(files, 4)) == 20
        with small_files(8192):
            write(files, 5, kept=large)
        assert caplog.text.count("rollouts cannot be written") == 2
    assert [file.version for file in files_in(files._folder)] == [1, 4]
    assert not list(files._folder.glob("*.partial"))


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path, model_folder, caplog):
    (tmp_path / "run").write_text("a file")
    files = RolloutFiles(WriterSetup(str(tmp_path / "run" / "rollouts"), str(model_folder), 2**20))
    with caplog.at_level(logging.WARNING):
        write(files)
    assert "rollouts cannot be written" in caplog.text


def test_the_folder_stays_within_its_size_and_one_file_within_a_quarter(tmp_path, model_folder, caplog):
    limit = 40_000
    files = RolloutFiles(WriterSetup(str(tmp_path), str(model_folder), limit))
    with caplog.at_level(logging.WARNING):
        for version in range(1, 12):
            write(files, version, kept=[make_kept(number, num_tokens=40) for number in range(20)])
            sizes = {file.version: file.path.stat().st_size for file in files_in(tmp_path)}
            assert sum(sizes.values()) <= limit
            assert 0 < sizes[version] <= limit // 4
    assert min(sizes) == 1, "the first step stays as long as it can"
    assert caplog.text.count("would not fit into a quarter of log.rollouts_max_mib") == 1
    assert 0 < len(read(files, 11)) < 20

"""Files of rollouts: written in one move, within a size, read back."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager

import pytest

from asyncrl.report.rollouts.files import file_of, files_in, read_file, remove_partial, trim, write_file
from asyncrl.types import LeaseKind
from tests.report.rollouts.making import make_record

TRAIN, EVAL = LeaseKind.TRAIN, LeaseKind.EVAL


@contextmanager
def small_files(num_bytes):
    """No file may grow beyond this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_are_named_and_found_by_kind_and_version(tmp_path):
    for kind, version in ((TRAIN, 20), (EVAL, 0), (TRAIN, 3), (EVAL, 20)):
        write_file(file_of(tmp_path, kind, version), [b"x\n"], 100)
    for other in ("step_x.jsonl", "step_1.jsonl.partial", "notes.txt", "step_-1.jsonl", "eval_1.json"):
        (tmp_path / other).touch()
    found = [(file.kind, file.version, file.path.name) for file in files_in(tmp_path)]
    assert found == [
        (EVAL, 0, "eval_0.jsonl"),
        (TRAIN, 3, "step_3.jsonl"),
        (EVAL, 20, "eval_20.jsonl"),
        (TRAIN, 20, "step_20.jsonl"),
    ]
    assert files_in(tmp_path / "none") == []


def test_a_step_that_is_made_again_replaces_its_file_as_a_whole(tmp_path):
    file = file_of(tmp_path, TRAIN, 3)
    write_file(file, [b"old 1\n", b"old 2\n"], 100)
    reader = file.path.open("rb")
    write_file(file, [b"new\n"], 100)
    assert file.path.read_bytes() == b"new\n"
    assert reader.read() == b"old 1\nold 2\n", "who was reading goes on with the file that was there"
    reader.close()
    assert os.listdir(tmp_path) == ["step_3.jsonl"]


def test_what_fails_half_way_leaves_what_was_there_and_nothing_else(tmp_path):
    file = file_of(tmp_path, TRAIN, 3)
    write_file(file, [b"old\n"], 100)

    def lines():
        yield b"new\n"
        assert file.path.read_bytes() == b"old\n", "nothing shows before it is whole"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_file(file, lines(), 100)
    assert file.path.read_bytes() == b"old\n"
    assert os.listdir(tmp_path) == ["step_3.jsonl"]


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path):
    file = file_of(tmp_path, TRAIN, 3)
    write_file(file, [b"old\n"], 100)
    with small_files(4096), pytest.raises(OSError):
        write_file(file, [b"x" * 1000 + b"\n"] * 100, 10**6)
    assert file.path.read_bytes() == b"old\n"
    assert os.listdir(tmp_path) == ["step_3.jsonl"]


def test_what_a_killed_process_had_begun_is_removed(tmp_path):
    write_file(file_of(tmp_path, TRAIN, 3), [b"old\n"], 100)
    (tmp_path / "step_20.jsonl.partial").write_bytes(b"half a li")
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == ["step_3.jsonl"]


def test_lines_that_do_not_fit_are_left_out_and_counted(tmp_path):
    file = file_of(tmp_path, TRAIN, 3)
    assert write_file(file, [b"123\n", b"456\n", b"789012\n", b"3\n"], 10) == 2
    assert file.path.read_bytes() == b"123\n456\n", "no line after the first that did not fit"


def test_the_oldest_go_first_and_the_first_ones_last(tmp_path):
    names = [(EVAL, 0), (TRAIN, 1), (TRAIN, 20), (EVAL, 20), (TRAIN, 40)]
    for kind, version in names:
        write_file(file_of(tmp_path, kind, version), [b"x" * 10], 100)
    newest = file_of(tmp_path, TRAIN, 40)

    def left(max_bytes):
        trim(tmp_path, max_bytes, newest)
        return [file.path.stem for file in files_in(tmp_path)]

    assert left(50) == ["eval_0", "step_1", "eval_20", "step_20", "step_40"]
    assert left(49) == ["eval_0", "step_1", "step_20", "step_40"]
    assert left(30) == ["eval_0", "step_1", "step_40"]
    assert left(29) == ["step_1", "step_40"]
    assert left(5) == ["step_40"], "the one that was just written stays"


def test_a_file_comes_back_and_lines_that_are_none_are_named(tmp_path):
    file = file_of(tmp_path, TRAIN, 5)
    records = [make_record(ordinal) for ordinal in (3, 4)]
    write_file(file, [records[0].to_line(), b"{\n", records[1].to_line()], 10**6)
    found, problems = read_file(file)
    assert found == records
    (problem,) = problems
    assert problem.startswith(f"{file.path}, line 2: ")

"""Which rollouts a reader gets, and what is said to one who asks for what is not there."""

from __future__ import annotations

import pytest

from asyncrl.errors import UserError
from asyncrl.report.rollouts.files import file_of, write_file
from asyncrl.report.rollouts.selection import Wanted, find_file, read_wanted, rollouts_folder, select
from asyncrl.types import LeaseKind
from tests.report.rollouts.making import make_record

TRAIN, EVAL = LeaseKind.TRAIN, LeaseKind.EVAL
REWARDS = [0.5, 0.0, 1.0, 0.25, 1.0, 0.0, 0.75]
RECORDS = [make_record(ordinal, reward=reward) for ordinal, reward in enumerate(REWARDS)]


def ordinals(**wanted):
    return [record.ordinal for record in select(RECORDS, Wanted(**wanted))]


def test_the_best_the_worst_and_others_each_once():
    assert ordinals(best=3) == [2, 4, 6]
    assert ordinals(worst=2) == [5, 1]
    assert ordinals(best=2, worst=1) == [2, 4, 5]
    everything = ordinals(best=2, worst=2, sample=3)
    assert everything[:4] == [2, 4, 5, 1] and sorted(everything) == list(range(7))


def test_more_than_there_are_is_all_of_them():
    assert sorted(ordinals(best=100)) == sorted(ordinals(worst=100)) == sorted(ordinals(sample=100)) == list(range(7))
    assert len(ordinals(best=5, worst=5)) == 7
    assert ordinals(best=0, worst=0) == []


def test_a_sample_is_the_same_each_time():
    assert ordinals(sample=3) == ordinals(sample=3)


def test_without_a_count_it_is_one_of_each_and_of_a_prompt_all():
    best, worst, other = ordinals()
    assert (best, worst) == (2, 5) and other not in (2, 5)
    assert ordinals(prompt=3) == list(range(7)), "which are those of the prompt, when it is asked for them"


@pytest.fixture
def folder(tmp_path):
    for kind, version in ((TRAIN, 1), (TRAIN, 20), (EVAL, 0), (EVAL, 40)):
        lines = [make_record(ordinal, kind=kind, version=version).to_line() for ordinal in (3, 4)]
        write_file(file_of(tmp_path, kind, version), lines, 10**6)
    return tmp_path


def test_the_newest_is_shown_unless_another_is_asked_for(folder):
    assert find_file(folder, Wanted()).path.name == "step_20.jsonl"
    assert find_file(folder, Wanted(version=1)).path.name == "step_1.jsonl"
    assert find_file(folder, Wanted(kind=EVAL)).path.name == "eval_40.jsonl"
    assert find_file(folder, Wanted(kind=EVAL, version=0)).path.name == "eval_0.jsonl"


def test_a_step_that_was_not_written_is_refused_with_those_that_were(folder):
    with pytest.raises(UserError, match=r"not of step 7, but of steps 1, 20; evaluations 0, 40"):
        find_file(folder, Wanted(version=7))
    for file in folder.glob("eval_*"):
        file.unlink()
    with pytest.raises(UserError, match=r"of no evaluation, but of steps 1, 20$"):
        find_file(folder, Wanted(kind=EVAL))


def test_of_many_steps_the_first_and_the_last_are_named(tmp_path):
    for version in range(100):
        write_file(file_of(tmp_path, TRAIN, version), [b""], 10)
    with pytest.raises(UserError, match=r"steps 0, 1, .*, 9, \.\.\., 90, .*, 99 \(100 of them\)"):
        find_file(tmp_path, Wanted(version=500))


def test_a_run_without_rollouts_and_a_folder_that_is_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no rollouts; .*log\.rollouts_every"):
        find_file(tmp_path / "rollouts", Wanted())
    with pytest.raises(UserError, match="there is no such folder; give the run.dir"):
        rollouts_folder(str(tmp_path / "none"))


def test_a_run_is_found_by_its_folder_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert rollouts_folder("mine") == rollouts_folder("runs/mine")


def test_a_prompt_that_is_not_there_is_refused_with_those_that_are(folder):
    file = find_file(folder, Wanted())
    records, problems = read_wanted(file, Wanted(prompt=4))
    assert [record.ordinal for record in records] == [4] and problems == []
    with pytest.raises(UserError, match=r"no rollout of prompt 5; it has prompts 3, 4"):
        read_wanted(file, Wanted(prompt=5))


def test_a_file_of_another_release_is_refused_in_its_words(folder):
    file = find_file(folder, Wanted())
    file.path.write_text('{"schema": 2}\n')
    with pytest.raises(UserError, match=r"step_20\.jsonl, line 1: its schema is 2"):
        read_wanted(file, Wanted())

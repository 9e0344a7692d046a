"""The crash loops: their checker finds every kind of broken promise, and a small loop keeps them all."""

from __future__ import annotations

import argparse
import hashlib
import re

import pytest

from asyncrl.storage.journal import Journal
from asyncrl.storage.records import MessageSeen, PromptGivenUp, StepTaken, StoredGroup
from benchmarks.faults.crash_loops import desk_part, trainer_part
from benchmarks.faults.crash_loops.answers import answer_times
from benchmarks.faults.crash_loops.audit import archive_segments, audit, generator_accounts
from benchmarks.faults.crash_loops.ledger import Ledger, MadeStep, TrainerLedger, sha

GROUPS_PER_STEP = 2


def body_of(ordinal: int) -> bytes:
    return b"group %d" % ordinal


def stored(ordinal: int, seq: int, attempt: int = 0, body: bytes | None = None) -> StoredGroup:
    return StoredGroup("g0", 1, seq, ordinal, attempt, 0, 0, 0, (3, 3), body_of(ordinal) if body is None else body)


class Run:
    """Two steps of two groups, all by g0; a test changes one thing and looks at the verdict."""

    def __init__(self, folder):
        self.folder = folder
        self.records = [stored(ordinal, ordinal + 1) for ordinal in range(4)]
        self.records += [StepTaken(0, ((0, 0), (1, 0))), StepTaken(1, ((2, 0), (3, 0)))]
        self.sent = {ordinal + 1: (ordinal, 0, sha(body_of(ordinal))) for ordinal in range(4)}
        self.acked = [1, 2, 3, 4]
        self.made = [self.step(1, (0, 1)), self.step(2, (2, 3))]

    @staticmethod
    def step(version, ordinals, chain=None):
        groups = tuple((ordinal, 0, sha(body_of(ordinal))) for ordinal in ordinals)
        return MadeStep(version, chain or hashlib.sha256(repr((version, groups)).encode()).hexdigest(), groups)

    def verdict(self, last_version=2):
        journal = Journal.open(self.folder / "journal")
        for record in self.records:
            journal.append(record, 0.0)
        journal.make_durable()
        archive_segments(self.folder / "journal", self.folder / "archive")
        journal.close()
        ledger = Ledger(self.folder / "ledgers" / "g0.generator")
        ledger.write("G", 1, "0.5")
        for seq, (ordinal, attempt, digest) in self.sent.items():
            ledger.write("S", 1, seq, "train", ordinal, attempt, 2, digest)
        for seq in self.acked:
            ledger.write("A", 1, seq)
        trainer = TrainerLedger(self.folder / "ledgers" / "steps.trainer")
        for step in self.made:
            trainer.made(step)
        return audit(self.folder / "ledgers", self.folder / "archive", GROUPS_PER_STEP, last_version)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_a_run_that_kept_its_promises_has_no_complaint(run):
    run.made.append(run.step(2, (2, 3)))  # again after a crash
    verdict = run.verdict()
    assert verdict.complaints == []
    assert (verdict.acked_groups, verdict.acked_rollouts, verdict.lost, verdict.steps_repeated) == (4, 8, 0, 1)


def lose_a_record(run):
    del run.records[3]


def store_other_bytes(run):
    run.records[3] = stored(3, 4, body=b"other")


def forget_a_failure(run):
    run.sent[5] = (4, 0, "0" * 24)
    run.acked.append(5)


def accept_a_message_twice(run):
    run.records.insert(4, stored(3, 4))


def accept_an_ordinal_twice(run):
    run.records.insert(4, stored(3, 9, attempt=1))


def train_an_ordinal_twice(run):
    run.records[5] = StepTaken(1, ((2, 0), (1, 0)))
    run.made[1] = run.step(2, (2, 1))


def make_a_version_of_other_groups(run):
    run.made.append(run.step(2, (2, 3), chain="f" * 64))


def train_before_it_is_decided(run):
    del run.records[5]


def skip_a_version(run):
    del run.made[0]


def skip_a_prompt(run):
    run.records[3] = stored(5, 4)
    run.records[5] = StepTaken(1, ((2, 0), (5, 0)))
    run.sent[4] = (5, 0, sha(body_of(5)))
    run.made[1] = run.step(2, (2, 5))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lose_a_record, "acknowledged, stored is None"),
        (store_other_bytes, "acknowledged, stored is"),
        (forget_a_failure, "acknowledged, stored is None"),
        (accept_a_message_twice, "accepted twice"),
        (accept_an_ordinal_twice, "ordinal 3 was accepted 2 times"),
        (train_an_ordinal_twice, "trained twice: ordinals \\[1\\]"),
        (make_a_version_of_other_groups, "version 2 was made of other groups the second time"),
        (train_before_it_is_decided, "version 2 was made of groups that no record names"),
        (skip_a_version, "versions are missing"),
        (skip_a_prompt, "neither trained nor given up: ordinals \\[3, 4\\]"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_kind_of_broken_promise_is_a_complaint(run, change, complaint):
    change(run)
    assert any(re.search(complaint, text) for text in run.verdict().complaints), run.verdict().complaints


def test_a_prompt_that_was_given_up_by_name_and_a_needless_result_are_none(run):
    skip_a_prompt(run)
    run.records += [PromptGivenUp(3), PromptGivenUp(4), MessageSeen("g0", 1, 7)]
    run.sent[7] = (2, 1, "0" * 24)
    run.acked.append(7)
    verdict = run.verdict()
    assert verdict.complaints == []
    assert (verdict.needless_groups, verdict.given_up) == (1, 2)


def test_answers_count_from_the_start_of_the_learner_for_generators_that_knew_one_before(tmp_path):
    kills = Ledger(tmp_path / "kills")
    for what in ("start learner 10", "start g0 10", "start g1 11.5", "kill learner 12", "start learner 12"):
        kills.write(*what.split())
    for what in ("kill learner 14", "start learner 14", "kill learner 14.5", "start learner 14.6"):
        kills.write(*what.split())
    for name, times in {"g0": (10.5, 12.7, 14.9), "g1": (13.1,)}.items():
        ledger = Ledger(tmp_path / f"{name}.generator")
        ledger.write("G", 1, "11.6" if name == "g1" else "10.1")
        for epoch, time in enumerate(times, 1):
            ledger.write("W", 1, time, epoch)
    found = answer_times(tmp_path, generator_accounts(tmp_path))
    assert [round(seconds, 3) for seconds in found[:2]] == [0.7, 0.3]


@pytest.mark.slow
def test_a_small_loop_of_kills_loses_nothing(tmp_path):
    options = argparse.Namespace(quick=True, seconds=120.0, seed=1, kills=10)
    result = desk_part.run(tmp_path, options)
    assert result is not None, "the run was not at its end after two minutes"
    assert result["complaints"] == []
    assert result["acked_groups"] >= 240


@pytest.mark.slow
def test_a_learner_that_was_killed_comes_to_the_weights_of_an_undisturbed_replay(tmp_path):
    options = argparse.Namespace(quick=True, seconds=200.0, seed=1, kills=3)
    result = trainer_part.run(tmp_path / "loop", options)
    assert result is not None, "the run was not at its end in time"
    assert result["complaints"] == []
    assert result["weights"] == result["weights_of_replay"]

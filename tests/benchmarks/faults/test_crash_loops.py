"""The crash loops: their checker finds every kind of broken promise, and a small loop keeps them all."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncrl.generator.lease_runner import LeaseRunner
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import MessageSeen, PromptGivenUp, StepTaken, StoredGroup
from benchmarks.faults.crash_loops import desk_part, trainer_part
from benchmarks.faults.crash_loops.answers import answer_figures, answer_times
from benchmarks.faults.crash_loops.audit import archive_segments, audit, generator_accounts
from benchmarks.faults.crash_loops.ledger import Ledger, MadeStep, TrainerLedger, sha
from benchmarks.faults.crash_loops.pace import LONGEST_WAIT_S, Pace, paced_runner
from benchmarks.faults.crash_loops.settings import Settings

GROUPS_PER_STEP = 2
SECONDS = 400.0  # for a loop that hangs


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


def note(folder: Path, kills: list[str], welcomes: dict[str, tuple[float, ...]]) -> None:
    """The ledgers of a killer, and of generators that begin at their first start."""
    ledger = Ledger(folder / "kills")
    for line in kills:
        ledger.write(*line.split())
    began = {name: time for what, name, time in map(str.split, reversed(kills)) if what == "start"}
    for name, times in welcomes.items():
        generator = Ledger(folder / f"{name}.generator")
        generator.write("G", 1, float(began[name]) + 0.1)
        for epoch, time in enumerate(times, 1):
            generator.write("W", 1, time, epoch)


def found_answers(folder: Path) -> list[float]:
    return [round(seconds, 3) for seconds in answer_times(folder, generator_accounts(folder))]


def test_answers_count_from_the_start_of_the_learner_for_generators_that_knew_one_before(tmp_path):
    kills = ["start learner 10", "start g0 10", "start g1 11.5", "kill learner 12", "start learner 12"]
    kills += ["kill learner 14", "start learner 14.6"]
    note(tmp_path, kills, {"g0": (10.5, 12.7, 14.9), "g1": (13.1,)})
    assert found_answers(tmp_path) == [0.7, 0.3, math.inf]  # g1 waits for the last learner to this day


def test_of_answers_those_count_whose_learner_and_generator_lived_for_longer_than_the_bar(tmp_path):
    kills = ["start g0 10", "start g1 10", "start learner 10"]
    kills += ["kill learner 20", "start learner 20", "kill learner 20.9", "start learner 21", "kill learner 23"]
    kills += ["start learner 30", "kill g1 30.8", "kill learner 31.5"]
    note(tmp_path, kills, {"g0": (11, 20.4, 22.5, 30.5), "g1": (11, 20.5, 30.2)})
    # The life from 20 on was too short for both, that from 30 on for g1, which never heard of the one from 21 on.
    assert found_answers(tmp_path) == [1.5, 2.0, 0.5]
    assert answer_figures(tmp_path, generator_accounts(tmp_path)) == {
        "answers": 3,
        "answer_median_s": 1.5,
        "answer_p95_s": 2.0,
        "answer_max_s": 2.0,
    }


def test_a_generator_that_left_by_itself_is_not_there_any_more_once_it_is_started_again(tmp_path):
    kills = ["start learner 10", "start g0 10", "start g0 15", "kill g0 15.5", "kill learner 20", "start learner 20"]
    note(tmp_path, kills, {"g0": (11,)})
    assert found_answers(tmp_path) == []


# -- the pace


STEPS, KILLS = 10, 4  # of two groups each: a share has 4 groups


def settings(**changes) -> Settings:
    values = {"port": 1, "steps": STEPS, "kills": KILLS, "groups_per_step": GROUPS_PER_STEP}
    return Settings(**values | changes)


class Paced:
    """The pace of a run, and what its ledgers are told."""

    def __init__(self, folder, **changes):
        self.kills, self.generator = Ledger(folder / "ledgers" / "kills"), Ledger(folder / "ledgers" / "g0.generator")
        self.pace = Pace(folder, settings(**changes), ("g0", "g1"))
        self.seq = 0

    def kill(self):
        self.kills.write("kill", "learner", 1.0)
        self.kills.write("start", "learner", 1.0)

    def send_below(self, ordinal):
        self.seq += 1
        self.generator.write("S", 1, self.seq, "train", ordinal - 1, 0, 2, "0" * 24)


@pytest.mark.parametrize(("steps", "kills"), [(10, 4), (20, 3), (250, 50), (513, 1000)])
def test_a_run_cannot_end_before_its_kills_and_its_kills_never_wait_for_what_is_held_back(tmp_path, steps, kills):
    run = Paced(tmp_path, steps=steps, kills=kills)
    last = steps * GROUPS_PER_STEP - 1
    for _ in range(kills):
        held_back = run.pace.first_held_back()
        assert held_back <= last
        run.send_below(math.ceil(held_back))  # all that may be made
        assert run.pace.may_kill(0.0)
        run.kill()
    assert run.pace.first_held_back() == math.inf
    assert not run.pace.may_kill(1e9)


def test_a_kill_waits_for_the_groups_of_the_shares_before_it_but_not_for_ever(tmp_path):
    run = Paced(tmp_path)
    assert run.pace.may_kill(0.0)
    run.kill()
    assert run.pace.may_kill(0.0)  # one share may be missing
    run.kill()
    assert not run.pace.may_kill(0.0) and run.pace.may_kill(LONGEST_WAIT_S)
    run.send_below(4)
    assert not run.pace.may_kill(0.0)
    run.send_below(5)
    run.send_below(2)  # a prompt that was leased again
    assert run.pace.may_kill(0.0)


def test_the_pace_of_a_run_that_goes_on_counts_what_was_before_and_no_line_that_is_being_written(tmp_path):
    run = Paced(tmp_path)
    run.kill()
    os.write(run.kills._fd, b"kill lear")
    assert Pace(tmp_path, settings()).kills() == run.pace.kills() == 1
    os.write(run.kills._fd, b"ner 1.0\n")
    assert run.pace.kills() == 2


def test_leases_are_held_back_until_the_kills_before_them_have_happened(tmp_path, monkeypatch):
    async def at_once(self, lease):
        return lease

    monkeypatch.setattr(LeaseRunner, "run", at_once)
    run = Paced(tmp_path)
    runner = object.__new__(paced_runner(run.pace))

    async def deliver():
        late, early = (
            asyncio.create_task(runner.run(SimpleNamespace(key=SimpleNamespace(ordinal=ordinal)))) for ordinal in (4, 3)
        )
        await early
        assert not late.done()
        run.kill()
        await late

    asyncio.run(deliver())


@pytest.mark.slow
def test_a_small_loop_of_kills_loses_nothing(tmp_path):
    options = argparse.Namespace(quick=True, seconds=SECONDS, seed=1, kills=10)
    result = desk_part.run(tmp_path, options)
    assert result is not None, "the run was not at its end in time"
    assert (result["complaints"], result["kills"]) == ([], 10)
    assert result["acked_groups"] >= 200  # of 240: a killed generator may not have read what was acknowledged


@pytest.mark.slow
def test_a_learner_that_was_killed_comes_to_the_weights_of_an_undisturbed_replay(tmp_path):
    options = argparse.Namespace(quick=True, seconds=SECONDS, seed=1, kills=3)
    result = trainer_part.run(tmp_path / "loop", options)
    assert result is not None, "the run was not at its end in time"
    assert (result["complaints"], result["kills"]) == ([], 3)
    assert result["weights"] == result["weights_of_replay"]

"""What a learner knows that was started again, before its trainer is up; what it writes at its end."""

from __future__ import annotations

import json
import signal

import pytest

from asyncrl.desk import daemon
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.intake import Intake
from asyncrl.desk.opening.restoring import restore_run
from asyncrl.desk.prompts import LeasedPrompts, MadeAtOnce
from asyncrl.desk.proofs import Proofs
from asyncrl.host.processes import StopSignal
from asyncrl.link.codec import encode_body
from asyncrl.link.rollouts import group_to_result
from asyncrl.report.advisor import Advice, AdvisedChange
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StepTaken
from tests.desk.desk_parts import VOCAB, Prompts, hello, small_config, train_group
from tests.replay.replay_making import make_group
from tests.report.runs import whole, write_run


def test_a_result_of_the_newest_version_before_the_restart_is_taken_while_the_trainer_is_not_up_yet(
    tied_model_dir, tmp_path
):
    """Its generator is back within a second, and a result that is refused is lost for good."""
    config = small_config(
        run__dir=str(tmp_path), model__path=str(tied_model_dir), task__path="asyncrl.tasks.arithmetic:Arithmetic"
    )
    journal = Journal.open(tmp_path / "journal")
    try:
        for version, ordinals in enumerate(([0, 1], [2, 3])):
            for ordinal in ordinals:
                journal.append(make_group(ordinal, version=version), 0.0)
            journal.append(StepTaken(version, tuple((ordinal, 0) for ordinal in ordinals)), 0.0)
        journal.make_durable()
        state = restore_run(config, 2, journal)
        assert (state.policy.trained, state.policy.newest) == (0, 2)

        prompts = LeasedPrompts(MadeAtOnce(Prompts()), state.leases)
        intake = Intake(
            config,
            vocab_size=VOCAB,
            state=state,
            prompts=prompts,
            proofs=Proofs(state.policy),
            acknowledgements=Acknowledgements(journal, state.sessions, state.counters),
        )
        fingerprints = state.sessions._expected
        greeting = hello("g2")
        fields = {name: getattr(greeting, name) for name in greeting.__slots__} | {
            "model_fingerprint": fingerprints.model_fingerprint,
            "tokenizer_fingerprint": fingerprints.tokenizer_fingerprint,
            "task": fingerprints.task,
            "settings": list(fingerprints.settings),
        }
        session = state.sessions.hello(b"g2", type(greeting)(**fields), version=0, now=0.0).session
        for seq, tokens_version, taken in ((1, 2, True), (2, 3, False)):
            group = train_group(3 + seq, version=tokens_version)
            ticket = state.tickets.issue(group.key, 0, "g2", 1)
            result = group_to_result(group, seq, 1, ticket)
            answer = intake.group(session, result, encode_body(result), 0.0).reply
            assert (answer is None) == taken, answer
    finally:
        journal.close()


@pytest.fixture
def make_stop():
    """A StopSignal, whose handlers of signals are gone after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopSignal
    for number, handler in before.items():
        signal.signal(number, handler)


def test_whoever_stops_a_long_run_does_not_wait_for_its_report(tmp_path, monkeypatch, caplog, capsys, make_stop):
    folder = write_run(tmp_path / "run", whole(5))
    size = (folder / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(daemon, "MAX_HURRIED_BYTES", size - 1)
    stopped = make_stop()
    stopped.request()
    with caplog.at_level("INFO"):
        daemon._report(folder, None, stopped)
    assert not (folder / "report.html").exists() and f"asyncrl report {folder}" in caplog.text
    daemon._report(folder, None, make_stop())
    assert (folder / "report.html").exists() and (folder / "summary.json").exists()
    (folder / "report.html").unlink()
    monkeypatch.setattr(daemon, "MAX_HURRIED_BYTES", size)
    daemon._report(folder, lambda run_dir, go_on: pytest.fail("somebody waits"), stopped)
    assert (folder / "report.html").exists()


def test_the_end_of_a_run_says_what_to_change_and_why_it_cannot(tmp_path, caplog, capsys, make_stop):
    folder = write_run(tmp_path / "run", whole(5))
    change = AdvisedChange("staleness.max_age=3", 480.0, 430.0, 530.0, 0.2, "tokens up to 3 steps old")
    daemon._report(folder, lambda run_dir, go_on: Advice((change,), measured=400.0), make_stop())
    said = "change       staleness.max_age=3: 480 tokens/s (430 to 530), +20%; costs: tokens up to 3 steps old"
    assert said in capsys.readouterr().out.splitlines()
    assert "staleness.max_age=3: 480" in (folder / "report.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["changes"][0]["gain"] == 0.2 and summary["changes_note"] == ""

    def fails(run_dir, go_on):
        raise ZeroDivisionError("no such run")

    daemon._report(folder, fails, make_stop())
    assert "the simulation of the run failed (ZeroDivisionError" in capsys.readouterr().out
    assert "its simulation failed" in caplog.text
    assert json.loads((folder / "summary.json").read_text())["changes"] == []


def test_a_signal_ends_the_thinking_over_and_not_the_summary(tmp_path, make_stop):
    """The signal comes while changes are thought over: `go_on` says so before the next simulation."""
    folder, stop, answers = write_run(tmp_path / "run", whole(5)), make_stop(), []

    def thinks(run_dir, go_on):
        answers.append(go_on())
        stop.request()
        answers.append(go_on())
        return Advice(note="one of two")

    daemon._report(folder, thinks, stop)
    assert answers == [True, False]
    assert json.loads((folder / "summary.json").read_text())["changes_note"] == "one of two"

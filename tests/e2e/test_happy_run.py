"""One undisturbed run by the two commands, looked at from all sides."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.metrics import EvalMetrics, StepMetrics, SyncMetrics, read_records
from asyncrl.metrics.ledger import GeneratorActivity, LearnerActivity
from asyncrl.metrics.types import DERIVED
from asyncrl.report.page.document import PAGE_FILE
from asyncrl.report.rollouts.choice import Why
from asyncrl.report.rollouts.files import files_in, read_file
from asyncrl.report.rollouts.records import RolloutRecord
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import SUMMARY_FILE, write_summary
from asyncrl.storage.records import StoredGroup
from asyncrl.types import LeaseKind
from tests.e2e.daemons import (
    START_S,
    STEP_S,
    Daemon,
    Run,
    check_every_ordinal_once,
    check_results_have_no_gap,
    steps_in,
    wait_until,
)
from tests.report.pages import Page
from tests.warm_processes import run_warm

STEPS = 8
KEPT_STEPS = (1, STEPS)  # the first and the last: log.rollouts_every is more
TRAINER_BEGAN, GENERATOR_BEGAN = "trainer started (pid", "the engine computes on"
TRAINER_ENDED, GENERATOR_ENDED = "the time of this trainer, ", "the time of this generator, "
SEEN_S = 0.2  # how late a line of a log is seen, and what goes on between a line and the moment that it tells of
SUMMARY_KEYS = [
    *("reward_first", "reward_last", "eval_first", "eval_last", "steps", "tokens_generated", "tokens_trained"),
    *("policy_age_mean", "policy_age_max", "rollouts_acked", "rollouts_trained", "rollouts_dropped", "sync_count"),
    *("sync_pause_ms_median", "sync_total_ms_median", "canary_max_abs_diff", "learner_idle_share"),
    *("generator_idle_share", "wall_s"),
]


def read_pages(run_dir: Path) -> dict[str, str]:
    """What both daemons answer now, where they wrote that they listen."""
    answers = {}
    for told in (run_dir / "http").glob("*.json"):
        (entry,) = json.loads(told.read_text())
        for page in ("healthz", "metrics"):
            with urllib.request.urlopen(f"http://{entry['targets'][0]}/{page}", timeout=10) as answer:
                answers[f"{told.stem.split('-')[0]} {page}"] = answer.read().decode()
    return answers


def are_ready(pages: dict[str, str]) -> bool:
    """Whether both work. The desk looks now and then only at who is missing, so that its page may lag behind."""
    return all(json.loads(page)["ready"] for name, page in pages.items() if name.endswith("healthz"))


def note_moments(run: Run, logs: dict[str, Daemon]) -> None:
    """Waits until each text is in the log of its daemon, and keeps when that was."""

    def look() -> bool:
        for text, daemon in logs.items():
            if text not in run.moments and text in daemon.stderr:
                run.moments[text] = time.time()
        return logs.keys() <= run.moments.keys()

    wait_until(look, START_S, "these lines of the logs", list(logs.values()))


@pytest.fixture(scope="module")
def run(module_run: Run) -> Run:
    """Learner and generator from start to end."""
    learner, generator = module_run.learner(), module_run.generator()
    note_moments(module_run, {TRAINER_BEGAN: learner, GENERATOR_BEGAN: generator})
    module_run.wait_for_version(1, learner, generator, timeout_s=START_S)
    wait_until(lambda: are_ready(read_pages(module_run.run_dir)), STEP_S, "pages that say ready", [learner, generator])
    module_run.pages.update(read_pages(module_run.run_dir))
    note_moments(module_run, {GENERATOR_ENDED: generator})
    learner.exit_code(STEP_S)
    generator.exit_code()
    return module_run


@pytest.fixture(scope="module")
def summary(run: Run) -> dict:
    return write_summary(RunRecords(run.run_dir)).to_json()


def test_both_commands_end_with_exit_code_0_by_themselves(run):
    assert [(daemon.name, daemon.exit_code()) for daemon in run.daemons] == [("learner-1", 0), ("generator-2", 0)]


def test_neither_prints_a_traceback_or_an_error(run):
    for daemon in run.daemons:
        assert not re.search(r"Traceback|Error\b|ERROR|CRITICAL", daemon.stderr), daemon.last_words()
    assert "Traceback" not in (run.run_dir / "trainer.log").read_text()


@pytest.mark.parametrize("daemon", ["learner", "generator"])
def test_its_pages_say_that_the_loop_turns_and_what_it_did(run, daemon):
    health = json.loads(run.pages[f"{daemon} healthz"])
    assert health["loop_turns"] and health["ready"], health
    assert health["state"] in ("training", "waiting", "generating", "swapping"), health
    families = {family.name: family for family in text_string_to_metric_families(run.pages[f"{daemon} metrics"])}
    counted = {"learner": "asyncrl_step_tokens_trained", "generator": "asyncrl_generator_tokens_generated"}[daemon]
    assert families[counted].type == "counter"
    assert families[counted].samples[0].value > 0
    assert not list((run.run_dir / "http").iterdir()), "what says where it listens goes with the daemon"


def test_no_process_is_left_behind(run):
    wait_until(lambda: not run.processes(), 10.0, f"no process of the run: {run.processes()}")


def test_the_summary_holds_everything_and_nothing_is_missing_a_measurement(run, summary):
    assert (run.run_dir / SUMMARY_FILE).is_file()
    assert {key: summary[key] for key in SUMMARY_KEYS if summary.get(key) is None} == {}
    assert summary["steps"] == STEPS


def test_the_learner_prints_a_line_per_step_and_the_summary_and_writes_the_report(run):
    page = run.run_dir / PAGE_FILE
    assert Page(page.read_text(encoding="utf-8")).data["step"] == STEPS
    out = run.daemons[0].stdout
    assert str(page) in out
    assert f"{STEPS}/{STEPS}" in out
    assert "evaluation" in out


def test_every_commit_was_proven_by_a_canary_within_1e_4(run, summary):
    syncs = [record for record in run.records("sync") if record["generators_committed"]]
    assert [sync["version"] for sync in syncs][0] == 0
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)
    assert 0 < summary["canary_max_abs_diff"] <= 1e-4  # exactly 0 would mean that nothing was compared


def test_no_token_is_older_than_max_age_and_nothing_was_dropped(run, summary):
    assert summary["policy_age_max"] <= run.config["staleness"]["max_age"]
    assert summary["rollouts_dropped"] == 0
    assert summary["rollouts_trained"] == STEPS * 16


def test_evaluations_at_start_and_end_are_complete(run):
    assert [(record["version"], record["prompts"]) for record in run.records("eval")] == [(0, 4), (STEPS, 4)]


def test_every_metrics_line_has_exactly_its_declared_fields(run):
    records, unreadable = read_records(run.run_dir / "metrics.jsonl")
    assert unreadable == 0
    declared = {cls.kind: {entry.name for entry in fields(cls)} for cls in (StepMetrics, SyncMetrics, EvalMetrics)}
    declared["step"] |= set(DERIVED)
    for record in records:
        assert set(record) - {"kind"} == declared[record["kind"]]


def said_s(log: str, text: str) -> float:
    """The sum over all activities that a daemon said at its end."""
    return float(re.search(rf"{text}([\d.]+) s: ", log).group(1))


def test_every_second_of_the_trainer_is_told_by_its_activity(run):
    """By another clock than the ledger's own: the lines of its log bear the time of day."""
    log = (run.run_dir / "trainer.log").read_text()
    (line,) = (line for line in log.splitlines() if TRAINER_ENDED in line)
    ended = datetime.strptime(" ".join(line.split()[:2]), "%Y-%m-%d %H:%M:%S,%f").timestamp()
    lasted_s = ended - run.moments[TRAINER_BEGAN]
    assert said_s(log, TRAINER_ENDED) == pytest.approx(lasted_s, rel=0.01, abs=SEEN_S)


def test_every_second_of_a_step_is_told_by_the_learners_activity(run):
    """The desk measures from one report to the next; the first step begins with the first generator that can work."""
    steps = run.records("step")
    measured_s = sum(step["interval_s"] for step in steps[1:])
    told_s = sum(sum(step["learner_time_s"].values()) for step in steps[1:])
    # The desk may be late to read the first report or the last, by which few steps differ.
    assert told_s == pytest.approx(measured_s, rel=0.01, abs=0.1)
    told = {activity for step in steps for activity in step["learner_time_s"]}
    assert {"start", "data", "compute", "snapshot", "checkpoint", "messages"} <= told <= {*map(str, LearnerActivity)}
    assert "restart" not in told
    for step in steps:
        time_s = step["learner_time_s"]
        assert step["learner_idle_s"] == pytest.approx(time_s.get("data", 0.0), abs=0.01)
        assert step["learner_idle_s"] <= step["interval_s"]
        assert time_s["compute"] == pytest.approx(step["step_s"], rel=0.1, abs=0.05)
    assert {"encode", "transfer", "stage", "checkpoint"} & {work for step in steps for work in step["overlapped_s"]}


def test_every_second_of_the_generator_is_told_by_its_activity(run):
    lasted_s = run.moments[GENERATOR_ENDED] - run.moments[GENERATOR_BEGAN]
    assert said_s(run.daemons[1].stderr, GENERATOR_ENDED) == pytest.approx(lasted_s, rel=0.01, abs=SEEN_S)


def test_the_time_that_the_desk_adds_up_is_that_of_the_generator(run):
    """A beat comes once a second at least: so much may be missing at each end, and nothing in between."""
    steps = run.records("step")
    added_up_s = sum(sum(step["generator_time_s"].values()) for step in steps[1:])
    measured_s = sum(step["interval_s"] for step in steps[1:])
    assert measured_s - 1.5 <= added_up_s <= measured_s + 1.5
    told = {activity for step in steps for activity in step["generator_time_s"]}
    assert {"start", "swap", "decode", "weights"} <= told <= {*map(str, GeneratorActivity)}
    for step in steps:
        time_s = step["generator_time_s"]
        busy_s = sum(time_s.get(name, 0.0) for name in ("swap", "decode", "eval"))
        assert step["generator_busy_s"] == pytest.approx(busy_s, abs=1e-6)
        idle_s = sum(time_s.values()) - busy_s - time_s.get("start", 0.0)
        assert step["generator_idle_s"] == pytest.approx(idle_s, abs=1e-6)
    samples = [
        sample
        for family in text_string_to_metric_families(run.pages["generator metrics"])
        for sample in family.samples
        if sample.name == "asyncrl_generator_time_seconds_total"
    ]
    assert {"start", "decode"} <= {sample.labels["activity"] for sample in samples}


def test_the_last_lines_say_where_the_time_went(run, summary):
    out = run.daemons[0].stdout
    for side, shares in (("learner", summary["learner_time_share"]), ("generators", summary["generator_time_share"])):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert re.search(rf"^{side:<13}{max(shares, key=shares.get)} \d+%", out, re.MULTILINE)


def test_every_prompt_was_trained_once(run):
    check_every_ordinal_once(run, STEPS)
    check_results_have_no_gap(run)


@pytest.fixture(scope="module")
def said(run: Run) -> dict[tuple[LeaseKind, int], list[RolloutRecord]]:
    """What was written of what the model said, by kind and version."""
    found = {}
    for file in files_in(run.run_dir / "rollouts"):
        records, problems = read_file(file)
        assert problems == []
        found[file.kind, file.version] = records
    return found


def test_rollouts_of_the_first_and_the_last_step_and_of_both_evaluations_are_written(said):
    steps = {(LeaseKind.TRAIN, version): 12 for version in KEPT_STEPS}
    evals = {(LeaseKind.EVAL, version): 4 for version in (0, STEPS)}
    assert {which: len(records) for which, records in said.items()} == steps | evals


def test_their_text_is_that_of_their_tokens(run, said, tied_model_dir):
    from asyncrl.host.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tied_model_dir))
    for (kind, version), records in said.items():
        for record in records:
            assert record.prompt == tokenizer.decode(record.prompt_ids, skip_special_tokens=False)
            assert record.completion == tokenizer.decode(record.token_ids, skip_special_tokens=True)
            assert "".join(record.token_texts) == tokenizer.decode(record.token_ids, skip_special_tokens=False)
            name = f"train{record.ordinal}" if kind is LeaseKind.TRAIN else f"eval{record.ordinal}"
            assert record.prompt == f"{name}:"
            assert record.payload == {"index": record.ordinal if kind is LeaseKind.TRAIN else -1}
            assert record.generator and record.version == version
            assert record.truncated == (record.token_ids[-1] != tokenizer.eos_token_id)


def test_their_versions_and_log_probs_are_those_of_the_run(run, said):
    for (kind, version), records in said.items():
        newest, oldest = version, version
        if kind is LeaseKind.TRAIN:
            newest, oldest = version - 1, max(0, version - 1 - run.config["staleness"]["max_age"])
        for record in records:
            assert all(oldest <= token <= newest for token in record.token_versions)
            assert np.isfinite(record.behaviour_logprobs).all() and max(record.behaviour_logprobs) <= 1e-6
            assert record.mismatches is None if kind is LeaseKind.EVAL else record.advantage is not None
            assert record.advantage in (None, 0.0) or record.mismatches is not None
            mismatches = record.mismatches or []
            assert np.isfinite(mismatches).all()
            if set(record.token_versions) == {newest}:  # else the engine attends to keys of an older policy
                assert np.abs(mismatches).max(initial=0.0) <= 1e-4, "one policy in two engines"


@pytest.mark.parametrize("step", KEPT_STEPS)
def test_the_best_and_the_worst_are_those_of_the_batch_that_the_journal_has(run, said, step):
    groups = {(r.ordinal, r.attempt): r for r in run.journal() if isinstance(r, StoredGroup)}
    batch = [groups[key] for key in steps_in(run.journal())[0][step - 1]]
    rollouts = {
        (record.ordinal, place): rollout
        for record in batch
        for place, rollout in enumerate(result_to_group(decode_body(GroupResult, record.body)).rollouts)
    }
    by_reward = sorted(rollout.reward for rollout in rollouts.values())
    kept = {why: [record for record in said[LeaseKind.TRAIN, step] if record.why is why] for why in Why}
    assert [record.reward for record in kept[Why.BEST]] == by_reward[::-1][:4]
    assert [record.reward for record in kept[Why.WORST]] == by_reward[:4]
    assert len({(record.ordinal, record.place) for record in said[LeaseKind.TRAIN, step]}) == 12
    for record in said[LeaseKind.TRAIN, step]:
        stored = rollouts[record.ordinal, record.place]
        assert record.token_ids == stored.token_ids.tolist()
        assert (record.reward, record.reward_parts) == (stored.reward, stored.reward_parts)
        assert record.generator == next(g.generator_id for g in batch if g.ordinal == record.ordinal)


def test_training_changed_the_policy_and_raised_the_reward_of_what_it_saw(run):
    """Learning itself is the quickstart's matter; here the gradient must at least be no zero."""
    assert all(record["grad_norm"] > 0 for record in run.records("step"))
    assert all(0.1 <= record["reward_mean"] <= 1.1 for record in run.records("step"))


def test_the_task_came_from_a_module_of_the_user(run):
    assert set(run.records("step")[0]["reward_parts"]) == {"base", "letters"}


def test_the_exported_model_is_the_policy_of_the_last_checkpoint(run, tied_model_dir: Path):
    """Loaded by transformers alone, and compared with the trainer's own weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from asyncrl.config.loading import load_config
    from asyncrl.trainer.checkpoint import load_checkpoint
    from asyncrl.trainer.engines.single import load_engines
    from asyncrl.trainer.step import StepRunner
    from tests.tolerances import assert_near

    config = load_config(run.run_dir / "config.yaml")
    trainer = StepRunner(load_engines(config, torch.device("cpu")), config)
    restored = load_checkpoint(run.run_dir / "checkpoints", trainer)
    assert restored is not None
    assert trainer.version == STEPS
    model = AutoModelForCausalLM.from_pretrained(run.run_dir / "export", dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(run.run_dir / "export").eos_token == "<end>"
    sequence = list(range(2, 60))
    ours = trainer.engines.actor.policy.score([sequence])[0]
    assert_near(_logprobs(model, sequence), ours)
    initial = AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32).eval()
    assert np.abs(_logprobs(initial, sequence) - ours).max() > 1e-3


def _logprobs(model, sequence: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].numpy()


def asyncrl(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncrl.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return run_warm(command, cwd=Path(__file__).parent, env=environment, timeout_s=STEP_S)


def test_a_replay_without_generators_gives_the_same_figures_and_weights_to_the_last_bit(run):
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    done = asyncrl(run, "replay", str(run.run_dir))
    assert done.returncode == 0, done.stderr
    assert f"{STEPS} steps trained again from the journal" in done.stdout
    assert "figures      equal to the last bit" in done.stdout and "weights      equal" in done.stdout
    again = run.run_dir / "replays" / "replay-1"
    losses = [
        [record["loss"] for record in read_records(folder / "metrics.jsonl")[0] if record["kind"] == "step"]
        for folder in (run.run_dir, again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before, "the run is only read"


def test_other_settings_train_the_same_rollouts_to_other_weights_and_say_that_it_is_counterfactual(run):
    into = run.folder / "other"
    done = asyncrl(run, "what-if", str(run.run_dir), "learner.lr=1e-2", "--steps", "4", "--into", str(into))
    assert done.returncode == 0, done.stderr
    assert "4 steps, learner.lr=1e-2" in done.stdout and "counterfactual" in done.stdout
    steps = [record for record in read_records(into / "metrics.jsonl")[0] if record["kind"] == "step"]
    recorded = [record for record in run.records("step") if record["version"] <= 4]
    assert [step["reward_mean"] for step in steps] == [step["reward_mean"] for step in recorded]
    assert steps[0]["loss"] == recorded[0]["loss"], "the first step begins with the same weights"
    assert steps[-1]["grad_norm"] != recorded[-1]["grad_norm"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "nowhere"], "holds no run"),
        (["replay", "{run}", "--steps", "9"], "--steps 9: the journal of {run} holds 8 steps"),
        (["what-if", "{run}", "sampling.group_size=2"], "are what they are"),
        (["what-if", "{run}", "learner.groups_per_step=2"], "are what they are"),
        (["what-if", "{run}", "algorithm.clip_hihg=2"], "clip_high"),
    ],
)
def test_what_cannot_be_trained_again_is_refused(run, arguments, words):
    done = asyncrl(run, *(argument.format(run=run.run_dir) for argument in arguments))
    assert done.returncode == 2 and words.format(run=run.run_dir) in done.stderr, done.stderr

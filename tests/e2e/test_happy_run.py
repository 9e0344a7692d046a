"""One undisturbed run by the two commands, looked at from all sides."""

from __future__ import annotations

import json
import re
import urllib.request
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncrl.metrics import EvalMetrics, StepMetrics, SyncMetrics, read_records
from asyncrl.metrics.types import DERIVED
from asyncrl.report.page.document import PAGE_FILE
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import SUMMARY_FILE, write_summary
from tests.e2e.daemons import START_S, STEP_S, Run, check_every_ordinal_once, check_results_have_no_gap, wait_until
from tests.report.pages import Page

STEPS = 8
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


@pytest.fixture(scope="module")
def run(module_run: Run) -> Run:
    """Learner and generator from start to end."""
    learner, generator = module_run.learner(), module_run.generator()
    module_run.wait_for_version(1, learner, generator, timeout_s=START_S)
    wait_until(lambda: are_ready(read_pages(module_run.run_dir)), STEP_S, "pages that say ready", [learner, generator])
    module_run.pages.update(read_pages(module_run.run_dir))
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


def test_every_prompt_was_trained_once(run):
    check_every_ordinal_once(run, STEPS)
    check_results_have_no_gap(run)


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

"""The studies: jobs that survive crashes, rollouts that are as old as they say, verdicts that follow from figures."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import critic_study, method_matrix, shared, staleness_study
from tests.benchmarks.scripts import run_script

ROOT = Path(__file__).parents[3]
WORKER = "tests.benchmarks.studies.sample_worker"
SCRIPTS = ("staleness_study", "critic_study", "method_matrix")


def job(seed: int, fate: str = "ends well") -> shared.Job:
    return {"method": "sample", "age": 0, "seed": seed, "fate": fate}


# -- jobs


def test_a_study_started_again_runs_only_what_is_missing(tmp_path, capsys):
    shared.run_in_turn([job(1)], shared.JobLog(tmp_path), lambda _: {"accuracy": 0.5})
    ran = []
    log = shared.JobLog(tmp_path)
    shared.run_in_turn([job(1), job(2)], log, lambda job: ran.append(job) or {"accuracy": 0.7})
    assert ran == [job(2)]
    assert [log.result_of(job(seed))["accuracy"] for seed in (1, 2)] == [0.5, 0.7]
    assert "2 runs, 1 of them done before" in capsys.readouterr().out


def test_a_job_with_other_settings_is_another_job(tmp_path):
    log = shared.JobLog(tmp_path)
    shared.run_in_turn([job(1)], log, lambda _: {"accuracy": 0.5})
    assert log.result_of({**job(1), "steps": 3}) is None


def test_a_line_cut_short_by_a_crash_costs_its_job_only(tmp_path):
    shared.run_in_turn([job(1)], shared.JobLog(tmp_path), lambda _: {"accuracy": 0.5})
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"job": {"method": "samp')
    shared.run_in_turn([job(2)], shared.JobLog(tmp_path), lambda _: {"accuracy": 0.7})
    log = shared.JobLog(tmp_path)
    assert [log.result_of(job(seed))["accuracy"] for seed in (1, 2)] == [0.5, 0.7]


def test_jobs_that_fail_or_kill_their_worker_are_written_down_and_the_others_run(tmp_path):
    jobs = [job(1), job(2, "raises"), job(3, "dies"), job(4), job(5)]
    log = shared.JobLog(tmp_path)
    shared.run_in_workers(jobs, log, WORKER)
    assert [log.result_of(jobs[index])["accuracy"] for index in (0, 3, 4)] == [0.1, 0.4, 0.5]
    assert "ValueError: as asked" in log.error_of(jobs[1])
    assert "the worker ended in the middle" in log.error_of(jobs[2])
    assert len(shared.JobLog(tmp_path).records) == len(jobs)


def test_workers_end_with_the_study(tmp_path):
    log = shared.JobLog(tmp_path)
    shared.run_in_workers([job(1), job(2)], log, WORKER)
    for seed in (1, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(log.result_of(job(seed))["pid"], 0)


# -- figures


def test_curves_are_means_of_equal_stretches():
    assert shared.thinned([1.0, 3.0, 5.0, 7.0, 10.0], 2) == [2.0, 6.0, 10.0]


def test_spread_is_the_sample_standard_deviation():
    assert shared.std([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert shared.std([4.0]) == 0.0


def outcome_of(accuracies: dict[tuple[str, int], list[float]], tmp_path: Path) -> staleness_study.Outcome:
    jobs, log = [], shared.JobLog(tmp_path)
    for (method, age), values in accuracies.items():
        for seed, value in enumerate(values):
            jobs.append({"method": method, "age": age, "seed": seed})
            log.append({"job": jobs[-1], "result": {"accuracy": value, "last_half": {}, "curves": {}}})
    methods = list(dict.fromkeys(method for method, _ in accuracies))
    options = argparse.Namespace(methods=methods, ages=sorted({age for _, age in accuracies}))
    return staleness_study.Outcome(options, jobs, log)


def test_flat_is_within_one_std_of_its_own_age_0_at_every_age_up_to_16(tmp_path):
    fresh = [0.90, 0.92, 0.94]  # mean 0.92, std 0.02
    outcome = outcome_of(
        {
            ("TIS", 0): fresh, ("TIS", 4): [0.91] * 3, ("TIS", 16): [0.901] * 3, ("TIS", 64): [0.1] * 3,
            ("M2PO", 0): fresh, ("M2PO", 4): [0.89] * 3, ("M2PO", 16): [0.95] * 3, ("M2PO", 64): [0.95] * 3,
            ("PPO clip", 0): fresh, ("PPO clip", 4): [0.92] * 3,
        },
        tmp_path,
    )  # fmt: skip
    assert outcome.is_flat("TIS", 16) is True
    assert outcome.is_flat("M2PO", 16) is False
    assert outcome.is_flat("PPO clip", 16) is None
    sentences = staleness_study.verdict(outcome)
    assert any(sentence.startswith("TIS: flat to age 16") and "-0.820 at 64" in sentence for sentence in sentences)
    assert any(sentence.startswith("M2PO: NOT flat") for sentence in sentences)


def test_the_best_of_ours_is_that_of_high_ages(tmp_path):
    accuracies = {}
    for method, values in {"ours: a": (0.99, 0.6, 0.5), "ours: b": (0.9, 0.8, 0.4), "TIS": (1.0, 1.0, 1.0)}.items():
        accuracies |= {(method, age): [value] for age, value in zip((0, 16, 64), values, strict=True)}
    assert outcome_of(accuracies, tmp_path).best_of_ours() == "ours: b"


@pytest.mark.parametrize(("accuracy", "word"), [(0.9, "beats"), (0.7, "does NOT beat")])
def test_vtrace_must_be_ahead_in_both_figures(accuracy, word):
    def figures(explained: float, accuracy: float) -> dict[str, list[float]]:
        return {critic_study.FRESH: [explained], critic_study.OWN: [], critic_study.ACCURACY: [accuracy]}

    found = {("gae", 16): figures(0.3, 0.8), ("vtrace", 16): figures(0.5, accuracy)}
    (sentence,) = critic_study.verdict(found, [0, 16])
    assert f"V-trace {word} plain GAE" in sentence


def test_a_method_passes_by_its_mean_and_its_least_seed_is_told():
    rows = [
        {"method": "grpo", "accuracy": [0.9, 0.8], "passed": True},
        {"method": "ppo", "accuracy": [0.8, 0.8], "passed": False},
    ]
    first, second = method_matrix.verdict(rows, 0.85)
    assert first == "1 of 2 methods reach 0.85; not ppo"
    assert "not with every seed: grpo" in second


# -- delayed sampling


@pytest.fixture(scope="module")
def training(tied_model_dir):
    from asyncrl.config.loading import load_config
    from benchmarks.studies.delayed_sampling import DelayedTraining

    overrides = [
        f"model.path={tied_model_dir}", "model.max_length=32", "sampling.group_size=4", "sampling.max_new_tokens=8",
        "sampling.temperature=0.7", "learner.groups_per_step=3", "learner.lr=1e-3", "learner.device=cpu",
        "algorithm.entropy_coef=0.1",  # a gradient although a random model earns nothing
    ]  # fmt: skip
    return DelayedTraining(load_config(None, overrides), age=2, eval_prompts=4)


def test_rollouts_come_from_the_version_they_name(training):
    import torch

    from tests.conftest import reference_logprobs

    model = training.sampler._model
    for step in range(4):
        groups = training.sample_batch()
        rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
        assert [group.key.ordinal for group in groups] == [3 * step, 3 * step + 1, 3 * step + 2]
        assert {rollout.oldest_version for _, rollout in rollouts} == {max(0, step - 2)}
        version, weights = training.versions[0]
        assert version == max(0, step - 2)
        model.load_state_dict(weights)
        for group, rollout in rollouts[::5]:
            tokens = [*group.prompt_token_ids.tolist(), *rollout.token_ids.tolist()]
            expected = torch.as_tensor(reference_logprobs(model, tokens, 0.7))[len(group.prompt_token_ids) - 1 :]
            assert np.abs(rollout.behaviour_logprobs - expected.numpy()).max() < 1e-4
        training.step()
    # The newest weights are others by now, or the test would show nothing.
    newest = training.versions[-1][1]
    assert max(float((newest[name] - weights[name]).abs().max()) for name in weights) > 1e-3


def test_completions_stop_at_the_end_token_and_are_repeatable(training):
    import torch

    prompts = [prompt.token_ids for prompt in training.held_out]
    prompts[1] = prompts[1][:-1]  # another length

    def drawn() -> list:
        return training.sampler.complete(prompts, 64, 1.0, torch.Generator().manual_seed(5))

    first = drawn()
    assert drawn() == first
    assert [len(completions) for completions in first] == [64] * len(prompts)
    everything = [completion for completions in first for completion in completions]
    end = training.tokenizer.eos_token_id
    for completion in everything:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert completion.ended == (completion.token_ids[-1] == end)
        assert end not in completion.token_ids[:-1]
        assert completion.ended or len(completion.token_ids) == 8
    assert len({completion.ended for completion in everything}) == 2


def test_a_greedy_completion_is_the_likeliest_token_each_time(training):
    import torch

    prompt = training.held_out[0].token_ids
    ((completion,),) = training.sampler.complete([prompt], 1, 0.0)
    tokens = prompt.tolist()
    for token in completion.token_ids:
        with torch.no_grad():
            logits = training.sampler._model(torch.tensor([tokens])).logits[0, -1]
        assert int(logits.argmax()) == token
        tokens.append(token)


# -- the scripts


@pytest.mark.slow
@pytest.mark.timeout(650)
@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_mode_ends_well_and_a_second_start_has_nothing_to_do(script, tied_model_dir, tmp_path):
    arguments = ["--quick", "--results", str(tmp_path), "--out", str(tmp_path / "runs"), "--model", str(tied_model_dir)]
    done = run_script(f"studies.{script}", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / f"{script}.quick.json").read_text())
    assert record["runs"] and all("accuracy" in run["result"] for run in record["runs"])
    assert any("--quick" in note for note in record["notes"])
    assert (tmp_path / f"{script}.quick.png").exists() == (script != "method_matrix")
    again = run_script(f"studies.{script}", *arguments)
    count = len(record["runs"])
    assert again.returncode == 0 and f"{count} runs, {count} of them done before" in again.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script):
    done = run_script(f"studies.{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--quick", "--seeds", "--steps", "--out", "--results"))

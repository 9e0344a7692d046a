"""Lengths as granted and as trained: what a count by hand says of runs that train short completions first, or more."""

from __future__ import annotations

import pytest

from asyncrl.report.lengths import Lengths
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summarize, summary_lines
from tests.report.runs import evaluation, step, write_run


def counts(rollouts, tokens):
    return {"rollouts": rollouts, "tokens": tokens}


def lengths_of(folder, records):
    run = RunRecords(write_run(folder, records))
    return Lengths.of(run.step_lines, run.steps)


def short_first(steps):
    """Of each version 3 completions of 10 tokens that are trained at once, and one of 50, trained 2 steps later."""
    found = []
    for version in range(1, steps + 1):
        batch = {"0": counts(3, 30)} | ({"2": counts(1, 50)} if version > 2 else {})
        rollouts, tokens = (sum(of[name] for of in batch.values()) for name in ("rollouts", "tokens"))
        figures = {"rollouts_trained": rollouts, "tokens_trained": tokens, "completion_tokens_mean": tokens / rollouts}
        found.append(step(version, came_in_by_grant_age=batch, trained_by_grant_age=batch, **figures))
    return found


def test_where_short_completions_come_first_training_begins_below_what_was_granted(tmp_path):
    run = RunRecords(write_run(tmp_path, short_first(10)))
    found = Lengths.of(run.step_lines, run.steps)
    assert found.came_in == dict.fromkeys(range(8), 20.0), "versions 8 and 9 still have their long ones out"
    assert found.trained == found.came_in and found.trained_share == 1.0, "nothing is lost"
    assert [record.completion_tokens_mean for record in run.steps[:3]] == [10.0, 10.0, 20.0]
    summary = summarize(run)
    assert summary.flow.grant_age_mean == pytest.approx(8 * 2 / (10 * 3 + 8))
    assert summary.flow.grant_age_token_mean == pytest.approx(8 * 100 / (10 * 30 + 8 * 50)), "long ones wait longer"
    (line,) = [line for line in summary_lines(summary, "run", "page") if line.startswith("lengths")]
    assert "granted 20.0   of them trained 20.0 tokens" in line and "after 0.42 steps, tokens after 1.14" in line


def test_what_is_filtered_or_lost_is_missing_among_what_was_trained(tmp_path):
    came_in, trained = {"0": counts(2, 20), "1": counts(2, 100)}, {"0": counts(2, 20), "1": counts(1, 50)}
    records = [
        step(version, came_in_by_grant_age=came_in, trained_by_grant_age=trained, rollouts_trained=3, tokens_trained=70)
        for version in range(1, 8)
    ]
    found = lengths_of(tmp_path, records)
    assert (found.came_in[3], found.trained[3]) == (30.0, pytest.approx(70 / 3))
    assert found.trained_share < 0.8


def test_a_step_that_was_trained_again_counts_once_and_what_came_in_adds_up(tmp_path):
    records = short_first(6)
    again = step(6, came_in_by_grant_age={"1": counts(1, 90)}, trained_by_grant_age={"0": counts(3, 30)})
    found = lengths_of(tmp_path, [*records, again])
    assert found.came_in[3] == 20.0
    assert lengths_of(tmp_path / "other", records).came_in.keys() == found.came_in.keys()


def test_a_run_of_an_older_release_has_no_lengths_by_grant(tmp_path):
    found = lengths_of(tmp_path, [step(1), step(2)])
    assert (found.came_in, found.came_in_mean, found.trained_share) == ({}, None, None)


def test_the_best_of_several_completions_is_in_summary_and_last_lines(tmp_path):
    def at_k(version, mean, best):
        result = evaluation(version, mean)
        result.samples, result.temperature = 4, 1.0
        result.reward_best_mean, result.reward_parts_best = best, {"correct": best}
        return result

    summary = summarize(RunRecords(write_run(tmp_path, [at_k(0, 0.25, 0.5), step(1), at_k(1, 0.5, 0.75)])))
    content = summary.to_json()
    assert (content["eval_samples"], content["eval_best_first"], content["eval_best_last"]) == (4, 0.5, 0.75)
    assert content["eval_parts_best_last"] == {"correct": 0.75}
    lines = summary_lines(summary, "run", "page")
    assert "evaluation   first 0.250   last 0.500   (avg@4)" in lines
    assert "             first 0.500   last 0.750   (pass@4 of correct)" in lines
    alone = summarize(RunRecords(write_run(tmp_path / "one", [evaluation(0, 0.25), step(1)])))
    assert not any("@" in line for line in summary_lines(alone, "run", "page"))

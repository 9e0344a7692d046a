"""Runs that learn nothing say so: in the log, in the metrics, and in the last lines."""

from __future__ import annotations

import pytest

from asyncrl.config.loading import load_config
from asyncrl.metrics import Metrics, StepMetrics
from asyncrl.metrics.alarms import Alarms
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summarize, summary_lines
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.rank import outcome_metrics
from asyncrl.trainer.step import StepRunner
from asyncrl.types import FinishReason
from tests.trainer.tiny import policy_of, random_groups, tiny_policy


def alarms_of(run_dir, groups_of_step, overrides=(), steps=6):
    """A run's steps on such groups, logged as the desk does; the last lines of its report, and its alarms."""
    config = load_config(None, ["model.path=unused", *overrides, f"run.dir={run_dir}", "algorithm.kl_coef=0.0"])
    runner = StepRunner(engines_for(tiny_policy(), config), config)
    metrics = Metrics.open(config, 1e-4)
    for version in range(steps):
        groups = groups_of_step(version, policy_of(runner))
        figures = runner.step(groups).metrics | outcome_metrics(groups)
        parts = {name: figures.pop(name) for name in list(figures) if name.startswith(("reward_part/", "age/"))}
        assert parts
        metrics.log_step(StepMetrics.of_step(figures, version=version + 1, interval_s=1.0))
    metrics.close()
    records = RunRecords(run_dir)
    lines = summary_lines(summarize(records), run_dir, run_dir / "report.html")
    return lines, records.alarm_steps()


def groups_with(version, policy, reward, finish=FinishReason.STOP):
    groups = random_groups(4, 4, seed=version, version=version, policy=policy)
    for index, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        rollout.reward = reward(index)
        rollout.reward_parts = {"exact": rollout.reward}
        rollout.finish_reason = finish
    return groups


COMMONEST = {
    "every reward is 0": (lambda index: 0.0, FinishReason.STOP, {"reward_std", "zero_variance_share"}),
    "every reward is the same": (lambda index: 0.35, FinishReason.STOP, {"reward_std", "zero_variance_share"}),
    "no group has a signal": (lambda index: float(index // 4 % 2), FinishReason.STOP, {"zero_variance_share"}),
    "every completion is cut": (lambda index: float(index % 2), FinishReason.LENGTH, {"truncated_share"}),
}


@pytest.mark.parametrize("name", COMMONEST)
def test_U2_the_commonest_failures_raise_alarms_in_log_metrics_and_summary(name, tmp_path, caplog):
    reward, finish, expected = COMMONEST[name]
    lines, alarms = alarms_of(tmp_path, lambda *of: groups_with(*of, reward, finish))
    assert set(alarms) == expected and min(alarms.values()) == 4
    (shown,) = [line for line in lines if line.startswith("alarms")]
    assert "none" not in shown and all(alarm in shown for alarm in expected)
    for alarm in expected:
        assert any(line.strip().startswith(f"{alarm}: ") for line in lines), "and what to do"
        (warning,) = [r.getMessage() for r in caplog.records if f"at step 3: {alarm} " in r.getMessage()]
        assert warning.count(";") >= 2
    if name == "every reward is 0":
        assert "every reward is 0.000" in caplog.text


def test_U2_a_run_that_learns_has_no_alarm(tmp_path):
    lines, alarms = alarms_of(tmp_path, lambda *of: groups_with(*of, lambda index: float(index % 3)))
    assert alarms == {} and "alarms       none" in lines


@pytest.mark.parametrize("method", ["reinforce_pp", "remax"])
def test_U2_groups_of_one_are_no_alarm_where_nothing_is_compared_within_groups(method, tmp_path):
    def groups(version, policy):
        made = groups_with(version, policy, lambda index: float(index % 3))
        for group in made:
            del group.rollouts[1:]
            group.baseline_reward = 0.5
        return made

    overrides = [f"algorithm.name={method}", "sampling.group_size=1"]
    assert "zero_variance_share" not in alarms_of(tmp_path, groups, overrides)[1]


@pytest.mark.parametrize(
    ("figures", "steps", "name"), [({"entropy": 0.001}, 10, "entropy"), ({"kl_reference": 3.0}, 3, "kl_reference")]
)
def test_U2_a_policy_that_collapses_or_leaves_its_reference_raises_an_alarm(figures, steps, name):
    alarms = Alarms(1e-4)
    changes = []
    for version in range(1, steps + 1):
        assert not changes
        step = StepMetrics(
            version=version, interval_s=1.0, reward_mean=0.5, reward_std=0.5, policy_age_mean=0.0, policy_age_max=0,
            **figures,
        )  # fmt: skip
        changes = alarms.update(step)
    assert [change.name for change in changes] == [name]
    assert "learner.lr" in changes[0].line

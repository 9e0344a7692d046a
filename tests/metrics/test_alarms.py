"""Alarms on off-policy health: when they go on and off, and what they say."""

import math
from dataclasses import fields, replace

import pytest

from asyncrl.config import Config
from asyncrl.metrics.alarms import RULES, Alarms
from asyncrl.metrics.types import DERIVED, StepMetrics

TOLERANCE = 1e-4


def step(version=1, **given):
    measured = {"interval_s": 1.0, "reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 1.0, "policy_age_max": 3}
    return StepMetrics(version=version, **{**measured, **given})


def fed(alarms, name, values):
    """What is active after each value."""
    active = []
    for version, value in enumerate(values, start=1):
        alarms.update(step(version, **{name: value}))
        active.append(list(alarms.active))
    return active


def onset(**given):
    """The lines of the alarms that go on when such a step repeats."""
    alarms = Alarms(TOLERANCE)
    return [change.line for version in range(1, 31) for change in alarms.update(step(version, **given)) if change.is_on]


def beyond(rule, limit):
    """A value just beyond, and one just on the healthy side of it."""
    towards = -1 if rule.side == "below" else 1
    return limit + towards * 1e-9, limit - towards * 1e-9


PLAIN = [rule for rule in Alarms(TOLERANCE).rules if rule.figure != "lost_share"]  # that one is computed


# -- the table


def test_every_rule_watches_a_figure_of_a_step_and_gives_its_reason_and_remedy():
    known = {entry.name for entry in fields(StepMetrics)} | set(DERIVED)
    assert len({rule.figure for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.figure in known
        assert rule.why.endswith(".") and rule.remedy, rule.figure
        assert rule.steps > 1, "one bad batch says nothing"
        assert not rule.is_bad(rule.clears_at), f"{rule.figure} would clear while it is bad"


def test_every_key_that_a_remedy_names_exists():
    words = " ".join(rule.remedy for rule in RULES).replace(",", " ").replace(";", " ").split()
    keys = [word.split("=")[0] for word in words if "." in word]
    assert len(keys) >= len(RULES)
    for key in keys:
        section, name = key.split(".")
        assert hasattr(getattr(Config(), section), name), key


def test_the_engines_limit_is_a_share_of_the_canary_tolerance():
    assert fed(Alarms(1e-4), "gap_engine", [2.6e-5] * 3)[-1] == ["gap_engine"]
    assert fed(Alarms(0.35), "gap_engine", [0.08] * 3)[-1] == []
    assert fed(Alarms(0.35), "gap_engine", [0.09] * 3)[-1] == ["gap_engine"]


# -- on and off


@pytest.mark.parametrize("rule", PLAIN, ids=lambda rule: rule.figure)
def test_each_alarm_goes_on_after_its_steps_in_a_row_and_no_sooner(rule):
    bad, good = beyond(rule, rule.limit)
    values = [bad] * (rule.steps - 1) + [good] + [bad] * rule.steps
    assert fed(Alarms(TOLERANCE), rule.figure, values) == [[]] * (len(values) - 1) + [[rule.figure]]


@pytest.mark.parametrize("rule", PLAIN, ids=lambda rule: rule.figure)
def test_each_alarm_stays_on_until_the_figure_is_well_on_the_healthy_side(rule):
    bad, hardly_better = beyond(rule, rule.limit)
    still_bad, well = beyond(rule, rule.clears_at)
    values = [bad] * rule.steps + [hardly_better, still_bad] * 5 + [well] * rule.steps
    active = fed(Alarms(TOLERANCE), rule.figure, values)
    assert active[rule.steps - 1 : -1] == [[rule.figure]] * (len(values) - rule.steps)
    assert active[-1] == []


def test_onset_and_end_are_reported_once_each():
    alarms = Alarms(TOLERANCE)
    values = [0.2] * 10 + [0.9] * 10
    changes = [c for v, value in enumerate(values, start=1) for c in alarms.update(step(v, ess_share=value))]
    assert [(change.name, change.is_on) for change in changes] == [("ess_share", True), ("ess_share", False)]
    assert changes[1].line == "alarm off at step 13: ess_share is 0.9"


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_figure_that_was_not_measured_changes_nothing(missing):
    values = [0.2, missing, 0.2, missing, 0.2, missing, 0.9, missing, 0.9, missing, 0.9]
    active = [bool(names) for names in fed(Alarms(TOLERANCE), "ess_share", values)]
    assert active == [False] * 4 + [True] * 6 + [False]


def test_an_infinite_figure_is_beyond_any_limit():
    assert fed(Alarms(TOLERANCE), "kl_behaviour", [math.inf] * 3)[-1] == ["kl_behaviour"]


def test_alarms_are_listed_in_the_order_of_the_table_whichever_came_first():
    alarms = Alarms(TOLERANCE)
    fed(alarms, "masked_share", [0.5] * 3)
    fed(alarms, "ess_share", [0.1] * 3)
    assert alarms.active == ["ess_share", "masked_share"]


def test_a_healthy_run_is_silent():
    # The worst figures of the quickstart's 120 steps, all in one.
    worst = {"ess_share": 0.977, "clip_fraction": 0.039, "kl_behaviour": 0.0088, "gap_engine": 3e-6, "gap_drift": 0.04}
    assert onset(**worst, rollouts_acked=256, explained_variance=0.2, masked_share=0.0) == []


# -- what they say


def test_the_warning_names_value_limit_and_the_age_where_it_begins():
    ages = {"4-7": {"ess_share": 0.1}, "0": {"ess_share": 0.99}, "64+": {"tokens": 3.0}, "2-3": {"ess_share": 0.5}}
    (line,) = onset(ess_share=0.21, gap_engine=1e-5, gap_drift=0.4, age_health=ages)
    assert line.startswith("alarm at step 3: ess_share 0.21 is below 0.3 for 3 steps; the policy moved away")
    assert "(drift 0.4 nats, engine mismatch 1e-05); by age 0: 0.99, 2-3: 0.5, 4-7: 0.1;" in line
    assert "lower staleness.max_age (to 3) or learner.lr" in line
    assert "\n" not in line


def test_a_gap_of_the_engine_is_not_blamed_on_staleness():
    (line,) = onset(kl_behaviour=0.2, gap_engine=0.00002, gap_drift=0.00001)
    assert "most of the gap is engine mismatch (2e-05 nats, policy drift 1e-05)" in line
    assert "model.dtype=float32" in line and "lower staleness.max_age or" not in line


def test_new_tokens_that_are_as_bad_point_at_the_updates_within_a_step():
    (line,) = onset(clip_fraction=0.5, age_health={"0": {"clip_fraction": 0.4}, "1": {"clip_fraction": 0.6}})
    assert "lower learner.epochs, learner.mini_batches or learner.lr" in line


def test_without_figures_by_age_the_remedy_names_no_value():
    (line,) = onset(masked_share=0.5)
    assert "lower staleness.max_age or learner.lr; algorithm.mask_low" in line


def test_lost_rollouts_name_their_commonest_reason():
    (line,) = onset(rollouts_acked=64, rollouts_dropped=2, rollouts_failed={"deadline": 9, "engine": 3, "returned": 50})
    assert "lost_share 0.184 is above 0.1 for 5 steps; most of them: deadline (9 rollouts in this step)" in line
    assert "generator.lease_timeout_s" in line


def test_a_rule_of_ones_own_is_applied_like_the_others():
    rule = replace(RULES[0], figure="entropy", limit=0.1, clears_at=0.2, steps=2, cause="too sure", remedy="see to it")
    alarms = Alarms(TOLERANCE, (rule,))
    lines = [change.line for version in (1, 2) for change in alarms.update(step(version, entropy=0.05))]
    assert lines == ["alarm at step 2: entropy 0.05 is below 0.1 for 2 steps; too sure; see to it"]

"""Figures as Prometheus reads them: by its own parser, with the right types, names and totals."""

import math
from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncrl.metrics import EvalMetrics, StepMetrics, SyncMetrics
from asyncrl.metrics.exposition import MAX_PARTS, Exposition, Family, families_of
from asyncrl.metrics.generator_metrics import GeneratorMetrics
from asyncrl.metrics.types import DERIVED

KINDS = [StepMetrics, SyncMetrics, EvalMetrics, GeneratorMetrics]
TEXTS = {"members", "apply", "encoding"}  # fields that are no numbers


def step(version=1, **figures):
    given = {"interval_s": 2.0, "reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0}
    return StepMetrics(version=version, **{**given, **figures})


def read(text):
    """(name of the sample, labels) → value, and name of the family → type; by Prometheus's own parser."""
    families = list(text_string_to_metric_families(text))
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    return samples, {family.name: family.type for family in families}


def test_counts_add_up_over_the_records_and_all_else_is_the_newest():
    figures = Exposition(StepMetrics, SyncMetrics)
    figures.write(step(1, tokens_trained=100, learner_idle_s=0.5, entropy=1.5))
    figures.write(step(2, tokens_trained=50, learner_idle_s=0.25, reward_mean=0.75))
    figures.write(SyncMetrics(version=2, total_ms=250.0, generators_committed=1, generators_failed=2))
    samples, types = read(figures.render())
    assert samples["asyncrl_step_tokens_trained_total", ()] == 150
    assert samples["asyncrl_step_learner_idle_seconds_total", ()] == 0.75
    assert samples["asyncrl_step_reward_mean", ()] == 0.75
    assert samples["asyncrl_step_learner_idle_share", ()] == 0.125
    assert samples["asyncrl_sync_total_seconds", ()] == 0.25
    assert samples["asyncrl_step_records_total", ()] == 2
    assert ("asyncrl_step_entropy", ()) not in samples, "the newest step has none, and an old one is not the newest"
    assert types["asyncrl_step_tokens_trained"] == "counter"
    assert types["asyncrl_step_reward_mean"] == types["asyncrl_sync_total_seconds"] == "gauge"
    assert 0 <= samples["asyncrl_newest_step_age_seconds", ()] < 60


def test_parts_of_a_figure_are_labels_and_any_text_in_them_survives():
    name = 'a "quoted"\\ name\nwith a line end'
    figures = Exposition(StepMetrics)
    for _ in range(2):
        figures.write(step(reward_parts={name: 0.5}, rollouts_failed={"timeout": 3}, alarms=["ess_share"]))
    figures.write(step(age_health={"2-3": {"ratio_max": 1.5}}, rollouts_failed={"returned": 1}))
    samples, _ = read(figures.render())
    assert samples["asyncrl_step_rollouts_failed_total", (("reason", "timeout"),)] == 6
    assert samples["asyncrl_step_rollouts_failed_total", (("reason", "returned"),)] == 1
    assert samples["asyncrl_step_age_health", (("age", "2-3"), ("figure", "ratio_max"))] == 1.5
    figures.write(step(reward_parts={name: 0.5}, alarms=["ess_share"], dropped_by_length_decile=[0, 7]))
    samples, _ = read(figures.render())
    assert samples["asyncrl_step_reward_parts", (("part", name),)] == 0.5
    assert samples["asyncrl_step_alarms", (("alarm", "ess_share"),)] == 1
    assert samples["asyncrl_step_dropped_by_length_decile", (("decile", "1"),)] == 7


def test_time_by_activity_is_a_counter_in_seconds():
    figures = Exposition(StepMetrics)
    figures.write(step(1, learner_time_s={"compute": 1.5, "data": 0.5}, overlapped_s={"transfer": 0.25}))
    figures.write(step(2, learner_time_s={"compute": 1.0}, generator_time_s={"decode": 3.0}))
    samples, types = read(figures.render())
    assert samples["asyncrl_step_learner_time_seconds_total", (("activity", "compute"),)] == 2.5
    assert samples["asyncrl_step_learner_time_seconds_total", (("activity", "data"),)] == 0.5
    assert samples["asyncrl_step_generator_time_seconds_total", (("activity", "decode"),)] == 3.0
    assert samples["asyncrl_step_overlapped_seconds_total", (("work", "transfer"),)] == 0.25
    assert types["asyncrl_step_learner_time_seconds"] == "counter"
    own = Exposition(GeneratorMetrics)
    for seconds in (1.0, 4.0):
        own.replace(GeneratorMetrics(time_s={"decode": seconds}))
    assert read(own.render())[0]["asyncrl_generator_time_seconds_total", (("activity", "decode"),)] == 4.0


def test_a_figure_that_is_no_number_is_shown_as_what_it_is():
    figures = Exposition(StepMetrics)
    figures.write(step(loss=math.nan, grad_norm=math.inf))
    samples, _ = read(figures.render())
    assert math.isnan(samples["asyncrl_step_loss", ()])
    assert samples["asyncrl_step_grad_norm", ()] == math.inf


def test_names_that_a_task_makes_up_without_end_do_not_grow_the_page():
    figures = Exposition(StepMetrics)
    for number in range(3 * MAX_PARTS):
        figures.write(step(rollouts_failed={f"reason {number}": 1}, reward_parts={"x" * 10_000: 1.0}))
    text = figures.render()
    assert text.count("asyncrl_step_rollouts_failed_total{") == MAX_PARTS
    assert len(text) < 40_000


def test_a_generators_totals_are_taken_as_they_are():
    figures = Exposition(GeneratorMetrics)
    for tokens in (10, 25):
        figures.replace(GeneratorMetrics(tokens_generated=tokens, held_version=3))
    samples, types = read(figures.render())
    assert samples["asyncrl_generator_tokens_generated_total", ()] == 25
    assert types["asyncrl_generator_tokens_generated"] == "counter"
    assert samples["asyncrl_generator_held_version", ()] == 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_number_that_is_declared_is_a_metric_with_its_sentence_and_a_name_of_its_own(kind):
    declared = {entry.name: entry.metadata for entry in fields(kind)}
    found = families_of(kind)
    assert set(found) == set(declared) - TEXTS | (set(DERIVED) if kind is StepMetrics else set())
    names = [family.name for family, _ in found.values()]
    assert len(set(names)) == len(names)
    for name, metadata in declared.items():
        if name not in TEXTS:
            family, factor = found[name]
            assert family.help.startswith(metadata["sentence"])
            assert family.kind == ("counter" if metadata["adds_up"] else "gauge")
            assert family.name.endswith("_total") == metadata["adds_up"]
            assert factor == (1e-3 if metadata["unit"] == "ms" else 1.0)
            assert ("_seconds" in family.name) == (metadata["unit"] in ("s", "ms")), family.name


def test_help_with_a_line_end_stays_one_line():
    (line, *_) = Family("a", "gauge", "one\ntwo \\ three", samples={(): 1.0}).lines()
    assert line == "# HELP a one\\ntwo \\\\ three"

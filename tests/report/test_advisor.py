"""What bounds a run, from ledgers of runs that are bounded by one thing each."""

import pytest

from asyncrl.metrics.ledger import GeneratorActivity
from asyncrl.report.advisor import CAUSES, bottleneck

STARVED = {"start": 10.0, "compute": 54.0, "data": 41.0, "snapshot": 5.0}  # 41 of 100 s at work
FED = {"start": 10.0, "compute": 92.0, "data": 4.0, "snapshot": 4.0}

RUNS = [
    (STARVED, {"start": 30.0, "decode": 93.0, "swap": 2.0, "leases": 5.0}, "generators", "engines sampled for 93%"),
    (STARVED, {"decode": 30.0, "rewards": 60.0, "leases": 10.0}, "rewards", "empty for 60% of theirs with rewards"),
    (STARVED, {"decode": 40.0, "weights": 35.0, "swap": 25.0}, "weight sync", "or were swapping for 60%"),
    (STARVED, {"decode": 40.0, "eval": 60.0}, "evaluation", "nothing but evaluations for 60%"),
    (STARVED, {"decode": 45.0, "leases": 55.0}, "staleness.max_age", "waited for leases for 55%"),
    (STARVED, {"decode": 45.0, "room": 55.0}, "the learner's intake", "could not leave generators for 55%"),
    (FED, {"start": 30.0, "decode": 50.0, "leases": 40.0, "room": 10.0}, "the learner", "generators 50% of theirs"),
    (FED, {"decode": 95.0, "leases": 5.0}, "both sides alike", "waited 4% of its time for data, generators 5%"),
    ({"start": 60.0, "compute": 40.0}, {"start": 60.0, "decode": 40.0}, "start-up", "60% of the learner's time"),
]  # fmt: skip


@pytest.mark.parametrize(("learner_s", "generator_s", "name", "evidence"), RUNS, ids=[run[2] for run in RUNS])
def test_the_bound_and_its_evidence(learner_s, generator_s, name, evidence):
    found = bottleneck(learner_s, generator_s)
    assert found.name == name
    assert evidence in found.evidence
    if learner_s is STARVED:
        assert "the learner waited 41% of its time for data" in found.evidence


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("generators", [1, 64])
def test_neither_the_length_of_a_run_nor_the_number_of_generators_changes_the_bound(factor, generators):
    for learner_s, generator_s, _, _ in RUNS:
        longer = {activity: factor * spent for activity, spent in learner_s.items()}
        fleet = {activity: factor * generators * spent for activity, spent in generator_s.items()}
        assert bottleneck(longer, fleet) == bottleneck(learner_s, generator_s)


@pytest.mark.parametrize(
    ("learner_s", "generator_s"),
    [({}, {}), (STARVED, {}), ({}, {"decode": 1.0}), (STARVED, {"start": 5.0}), ({"start": 5.0}, {"decode": 1.0})],
)
def test_a_run_in_which_a_side_never_came_to_work_is_not_judged(learner_s, generator_s):
    assert bottleneck(learner_s, generator_s) is None


def test_every_activity_of_a_generator_at_work_is_a_cause_or_none_of_its_own():
    named = {activity for activities, _, _ in CAUSES for activity in activities}
    assert {*GeneratorActivity} - named == {GeneratorActivity.START, GeneratorActivity.OTHER}

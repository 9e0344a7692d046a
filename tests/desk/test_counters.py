"""Counters of generators and trainer become increments of a step, across restarts of either."""

from __future__ import annotations

import pytest

from asyncrl.desk.counters import MAX_GRANT_AGE, Counters, RunTotals
from asyncrl.link.trainer_messages import StepDone
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.pacing import Pacing
from asyncrl.storage.records import StoredGroup
from asyncrl.weights.plan.records import Committed, RoundEnded
from tests.desk.desk_parts import beat


def stored(issued_version, num_tokens):
    return StoredGroup("a", 1, 1, 0, 0, issued_version, issued_version, issued_version, num_tokens, b"")


def step(counters: Counters, version: int = 1, *, time_s=None, interval_s: float = 2.0, **metrics: float):
    figures = {"reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0.0} | metrics
    done = StepDone(version, figures, step_s=0.5, time_s=time_s or {})
    return counters.step_metrics(done, interval_s, ReplayBuffer(Pacing(2, 1, 5)), 1)


def test_tokens_of_a_step_are_those_sampled_since_the_step_before():
    counters = Counters()
    counters.beat("a", 1, beat(tokens_generated=0))
    counters.beat("a", 1, beat(tokens_generated=100, busy_s=1.5, idle_s=0.5))
    first = step(counters)
    counters.beat("a", 1, beat(tokens_generated=150, busy_s=2.0, idle_s=0.5))
    second = step(counters, 2)
    assert (first.tokens_generated, second.tokens_generated) == (100, 50)
    assert (first.generator_busy_s, first.generator_idle_s, second.generator_idle_s) == (1.5, 0.5, 0.0)


def test_a_restarted_generator_counts_from_zero_and_nothing_is_lost_or_negative():
    counters = Counters()
    counters.beat("a", 1, beat(tokens_generated=0))
    counters.beat("a", 1, beat(tokens_generated=100))
    counters.beat("a", 2, beat(tokens_generated=7))
    assert step(counters).tokens_generated == 107


def test_what_a_generator_did_before_this_learner_started_belongs_to_no_step():
    counters = Counters()
    counters.beat("a", 1, beat(tokens_generated=1000))
    counters.beat("a", 1, beat(tokens_generated=1010))
    assert step(counters).tokens_generated == 10


def test_acknowledged_dropped_and_failed_rollouts_are_increments_by_reason():
    counters = Counters()
    counters.totals = RunTotals(rollouts_acked=8, rollouts_dropped=4)
    counters.lease_failed("engine", 4)
    first = step(counters)
    counters.totals.rollouts_acked = 20
    counters.lease_failed("engine", 4)
    counters.lease_failed("reward_error", 1)
    second = step(counters, 2)
    assert (first.rollouts_acked, first.rollouts_dropped, first.rollouts_failed) == (8, 4, {"engine": 4})
    assert (second.rollouts_acked, second.rollouts_dropped) == (12, 0)
    assert second.rollouts_failed == {"engine": 4, "reward_error": 1}


def test_filtered_groups_and_their_tokens_are_increments_and_a_share_of_what_was_sampled():
    counters = Counters()
    counters.totals = RunTotals(groups_filtered=1, tokens_filtered=30)
    first = step(counters, tokens_trained=90.0)
    restored = Counters()
    restored.restore(counters.state())
    restored.totals.groups_filtered, restored.totals.tokens_filtered = 3, 80
    second = step(restored, 2, tokens_trained=50.0)
    assert (first.groups_filtered, first.tokens_filtered, first.filtered_token_share) == (1, 30, 0.25)
    assert (second.groups_filtered, second.tokens_filtered, second.filtered_token_share) == (2, 50, 0.5)


def test_what_came_in_and_what_is_trained_is_told_by_the_age_of_its_grant():
    counters = Counters()
    counters.came_in(issued_version=0, num_tokens=[5, 7])
    counters.came_in(issued_version=2, num_tokens=[1, 1])
    counters.batch_decided(3, [stored(issued_version=0, num_tokens=(5, 7)), stored(issued_version=2, num_tokens=(4,))])
    counters.batch_decided(4, [stored(issued_version=3, num_tokens=(9,))])
    third, fourth = step(counters, 3), step(counters, 4)
    assert third.came_in_by_grant_age == {"0": {"rollouts": 2, "tokens": 2}, "2": {"rollouts": 2, "tokens": 12}}
    assert third.trained_by_grant_age == {"0": {"rollouts": 1, "tokens": 4}, "2": {"rollouts": 2, "tokens": 12}}
    assert (third.grant_age_mean, third.grant_age_token_mean) == (pytest.approx(4 / 3), 1.5)
    assert (fourth.came_in_by_grant_age, fourth.trained_by_grant_age) == ({}, {"0": {"rollouts": 1, "tokens": 9}})
    assert step(counters, 5).grant_age_mean is None, "a batch that was decided before a restart"


def test_grant_ages_are_bounded_on_both_sides():
    """A lease of long ago, or of a version that a restart took back, makes no name of its own."""
    counters = Counters()
    counters.came_in(issued_version=0, num_tokens=[5])
    counters.came_in(issued_version=700, num_tokens=[7])
    figures = step(counters, 600)
    assert figures.came_in_by_grant_age == {
        "0": {"rollouts": 1, "tokens": 7}, str(MAX_GRANT_AGE): {"rollouts": 1, "tokens": 5},
    }  # fmt: skip


def test_restored_counters_go_on_where_the_checkpoint_was():
    counters = Counters()
    counters.totals = RunTotals(rollouts_acked=8)
    counters.lease_failed("engine", 4)
    restored = Counters()
    restored.restore(counters.state())
    restored.totals.rollouts_acked += 3
    figures = step(restored)
    assert (figures.rollouts_acked, figures.rollouts_failed) == (3, {"engine": 0})


# -- where the time goes


def test_waiting_from_before_a_generator_could_work_is_start_up_and_no_idling():
    figures = step(Counters(), time_s={"start": 6.0, "data": 9.0, "compute": 0.5})
    assert figures.learner_idle_s == 2.0
    assert figures.learner_time_s == {"start": 13.0, "data": 2.0, "compute": 0.5}


def test_the_trainers_time_is_what_its_totals_grew_by():
    counters = Counters()
    first = step(counters, time_s={"start": 6.0, "data": 1.5, "compute": 0.5})
    second = step(counters, 2, time_s={"start": 6.0, "data": 2.0, "compute": 1.5, "checkpoint": 0.5})
    assert first.learner_time_s == {"start": 6.0, "data": 1.5, "compute": 0.5}
    assert second.learner_time_s == {"data": 0.5, "compute": 1.0, "checkpoint": 0.5}
    assert second.learner_idle_s == 0.5


def test_after_a_trainers_death_what_nobody_reported_is_lost_and_nothing_counts_twice():
    """It reported 10 s and died 5 s later; the next one came 1 s after that and needed 4 s to get back."""
    counters = Counters()
    step(counters, 1, time_s={"start": 4.0, "compute": 6.0}, interval_s=6.0)
    counters.trainer_lost()
    again = step(counters, 2, time_s={"start": 3.0, "compute": 1.0}, interval_s=10.0)
    after = step(counters, 3, time_s={"start": 3.0, "compute": 3.0}, interval_s=2.5)  # a desk that reads it late
    assert again.learner_time_s == {"start": 3.0, "compute": 1.0, "restart": 6.0}
    assert after.learner_time_s == {"compute": 2.0}


def test_a_report_that_a_dead_trainer_left_behind_counts_no_time_for_its_successor():
    counters = Counters()
    step(counters, 1, time_s={"compute": 6.0}, interval_s=6.0)
    counters.trainer_lost()
    left_behind = step(counters, 2, interval_s=1.0)
    again = step(counters, 3, time_s={"start": 3.0, "compute": 2.0}, interval_s=8.0)
    assert left_behind.learner_time_s == {"restart": 1.0}
    assert again.learner_time_s == {"start": 3.0, "compute": 2.0, "restart": 3.0}


def test_a_trainer_that_says_nothing_of_its_time_has_none():
    figures = step(Counters())
    assert (figures.learner_time_s, figures.learner_idle_s) == ({}, 0.0)


def test_the_time_of_generators_is_summed_over_them_by_activity():
    counters = Counters()
    counters.beat("a", 1, beat(time_s={"start": 5.0}))
    counters.beat("b", 1, beat(time_s={"start": 7.0, "decode": 1.0}))
    counters.beat("a", 1, beat(time_s={"start": 6.0, "decode": 1.5, "leases": 0.5}))
    counters.beat("b", 1, beat(time_s={"start": 7.0, "decode": 4.0}))
    first = step(counters)
    counters.beat("a", 1, beat(time_s={"start": 6.0, "decode": 2.0, "leases": 0.5}))
    assert first.generator_time_s == {"start": 1.0, "decode": 4.5, "leases": 0.5}
    assert step(counters, 2).generator_time_s == {"decode": 0.5}


def test_a_generator_that_joins_late_leaves_or_is_replaced_counts_each_second_once():
    counters = Counters()
    counters.beat("a", 1, beat(time_s={"decode": 100.0}))  # from before this learner, or before it was there
    counters.beat("a", 1, beat(time_s={"decode": 103.0}))
    counters.beat("a", 2, beat(time_s={"start": 9.0}))  # the next process under its name begins at zero
    counters.beat("a", 2, beat(time_s={"start": 9.0, "decode": 1.0}))
    counters.beat("a", 2, beat(time_s={"start": 9.0, "decode": 1.0}))  # and then it is gone
    assert step(counters).generator_time_s == {"decode": 4.0, "start": 9.0}
    assert step(counters, 2).generator_time_s == {}


def test_no_sum_falls_and_no_name_is_made_up_by_what_a_generator_says():
    counters = Counters()
    counters.beat("a", 1, beat(time_s={"decode": 5.0}))
    counters.beat("a", 1, beat(time_s={"decode": 4.0, "swap": 1.0, "a name": 2.0, "another": 3.0}))
    assert step(counters).generator_time_s == {"swap": 1.0, "other": 5.0}


def test_what_an_engines_step_takes_is_the_mean_of_those_that_have_told_since_the_last_step():
    counters = Counters()
    counters.beat("a", 1, beat(engine_step_ms={"fixed": 9.0}))
    counters.beat("a", 1, beat(engine_step_ms={"fixed": 2.0, "sequence": 0.5}))
    counters.beat("b", 1, beat(engine_step_ms={"fixed": 4.0, "sequence": 0.25}))
    counters.beat("c", 1, beat())
    assert step(counters).engine_step_ms == {"fixed": 3.0, "sequence": 0.375}
    counters.beat("b", 1, beat(engine_step_ms={"fixed": 4.0}))
    assert step(counters, 2).engine_step_ms == {"fixed": 4.0}
    assert step(counters, 3).engine_step_ms == {}


def test_cpu_time_of_generators_is_added_up_over_their_processes():
    counters = Counters()
    counters.beat("a", 1, beat(cpu_s=100.0))
    counters.beat("a", 1, beat(cpu_s=103.0))
    counters.beat("a", 2, beat(cpu_s=2.0))
    figures = step(counters)
    assert (figures.generator_cpu_s, figures.learner_cpu_s) == (5.0, None)
    assert step(counters, 2).generator_cpu_s == 0.0


def test_work_beside_training_is_reported_apart():
    counters = Counters()
    counters.sync_metrics(ended(committed("a", stage_ms=300.0), committed("b", stage_ms=500.0), encode_ms=250.0))
    counters.sync_metrics(ended(committed("a")))
    counters.checkpoint_saved(1.5)
    figures = step(counters, time_s={"compute": 2.0})
    assert figures.overlapped_s == pytest.approx({"encode": 0.25, "transfer": 0.08, "stage": 0.8, "checkpoint": 1.5})
    assert figures.learner_time_s == {"compute": 2.0}
    assert step(counters, 2).overlapped_s == {}


def test_reward_parts_are_split_from_the_trainers_figures():
    figures = step(Counters(), **{"reward_part/exact": 0.25, "reward_part/format": 0.5, "model_inputs": 64.0})
    assert figures.reward_parts == {"exact": 0.25, "format": 0.5}
    assert figures.extra == {"model_inputs": 64.0}


def committed(name="g", version=3, *, mean=1e-7, largest=1e-6, **timings_ms):
    return Committed(name, 1, version, 0, 100.0, largest, mean, timings_ms)


def ended(*members, version=3, failed=(), num_bytes=1000, **figures):
    return RoundEnded(version, 120.0, 40.0, num_bytes, members, failed, **figures)


def test_a_sync_reports_the_slowest_and_the_worst_canary_of_its_generators():
    members = (
        committed("b", largest=2e-6, mean=4e-7, pause_ms=5.0, receive_ms=4.0, verify_ms=3.0, canary_ms=8.0),
        committed("a", largest=1e-6, mean=2e-7, pause_ms=9.0, receive_ms=2.0, verify_ms=7.0, stage_ms=11.0),
    )
    figures = Counters().sync_metrics(ended(*members, failed=("c",), snapshot_ms=1.5, retries=2, num_bytes=10_000_000))
    assert (figures.pause_ms, figures.receive_ms, figures.verify_ms) == (9.0, 4.0, 7.0)
    assert (figures.stage_ms, figures.canary_ms, figures.snapshot_ms, figures.total_ms) == (11.0, 8.0, 1.5, 120.0)
    assert (figures.canary_max_abs_diff, figures.canary_mean_abs_diff) == (2e-6, pytest.approx(3e-7))
    assert (figures.generators_committed, figures.generators_failed, figures.retries) == (2, 1, 2)
    assert figures.members == ["a", "b", "c"]
    assert figures.transfer_gb_per_s == pytest.approx(10_000_000 / 1e9 / 0.004)
    assert (figures.decode_ms, figures.prepare_ms) == (None, None), "nobody measured them"


def test_a_sync_tells_what_was_sent():
    counters = Counters()
    dense = counters.sync_metrics(ended(committed(), num_bytes=5000, dense_bytes=5000))
    delta = counters.sync_metrics(ended(committed(), num_bytes=40, dense_bytes=5000, base_version=0, encode_ms=2.0))
    assert (dense.encoding, dense.num_bytes, dense.dense_bytes, dense.encode_ms) == ("dense", 5000, 5000, None)
    assert (delta.encoding, delta.num_bytes, delta.dense_bytes, delta.encode_ms) == ("delta", 40, 5000, 2.0)
    assert not dense.catch_up and counters.sync_metrics(ended(committed(), catch_up=True)).catch_up


@pytest.mark.parametrize(
    ("timings", "apply"),
    [
        (["direct_ms"], "direct"),
        (["direct_ms", "reload_ms"], "reload"),
        (["reload_ms"], "reload"),
        (["pause_ms"], None),
    ],
)
def test_a_sync_tells_whether_any_engine_had_to_reload(timings, apply):
    members = [committed(**{name: 1.0}) for name in timings]
    assert Counters().sync_metrics(ended(*members)).apply == apply


def synced(counters: Counters, version: int, *means: float) -> None:
    counters.sync_metrics(ended(*(committed(f"g{i}", mean=mean) for i, mean in enumerate(means)), version=version))


def test_the_gap_is_split_into_what_the_newest_sync_left_and_the_rest():
    counters = Counters()
    unsynced = step(counters, logprob_gap=0.03)
    assert (unsynced.gap_engine, unsynced.gap_drift) == (None, None)
    synced(counters, 1, 0.5)
    synced(counters, 2, 0.01, 0.02)
    synced(counters, 3)  # nobody committed: the one before stays the newest
    measured = step(counters, 2, logprob_gap=0.04)
    assert (measured.gap_engine, measured.gap_drift) == (pytest.approx(0.015), pytest.approx(0.025))
    assert step(counters, 3).gap_drift is None, "without a gap there is nothing to split"


def test_a_gap_smaller_than_the_engines_is_no_negative_drift():
    counters = Counters()
    synced(counters, 1, 0.02)
    assert step(counters, logprob_gap=0.01).gap_drift == 0.0


def test_figures_by_age_are_nested_by_bucket():
    named = {"age/2-3/ess_share": 0.5, "age/2-3/tokens": 64.0, "age/64+/tokens": 8.0, "masked_share": 0.1}
    figures = step(Counters(), **named)
    assert figures.age_health == {"2-3": {"ess_share": 0.5, "tokens": 64.0}, "64+": {"tokens": 8.0}}
    assert (figures.masked_share, figures.extra) == (0.1, {})


def test_a_sync_that_nobody_committed_has_no_pause_and_no_canary():
    figures = Counters().sync_metrics(ended(failed=("g",), num_bytes=0))
    assert (figures.pause_ms, figures.canary_max_abs_diff, figures.num_bytes) == (None, None, None)
    assert (figures.canary_mean_abs_diff, figures.transfer_gb_per_s, figures.encoding) == (None, None, None)
    assert figures.members == ["g"]

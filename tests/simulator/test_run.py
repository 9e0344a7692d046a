"""Simulated runs against what can be reckoned by hand, and against the promises of the rules that they run over."""

from __future__ import annotations

import random
import time

import pytest

from asyncrl.errors import ConfigError
from asyncrl.simulator.model import Service, SharedCores, Sizes
from asyncrl.simulator.run import SimulatedRun
from asyncrl.simulator.times import Constant, LogNormal, Measured
from tests.sizes import usual


def sizes(**changes) -> Sizes:
    values = {
        "generators": 1,
        "max_sequences": 8,
        "group_size": 2,
        "groups_per_step": 4,
        "max_age": 1,
        "steps": 20,
        **changes,
    }
    return Sizes(**values)


def service(**changes) -> Service:
    values = {"completion_tokens": Constant(10), "decode_s": 0.1, "decode_sequence_s": 0.0, "step_s": Constant(0.5)}
    return Service(**{**values, **changes})


def test_synchronous_training_is_the_sum_of_its_parts():
    """max_age=0: sample, score, train, send, swap, prove, one after the other; no step overlaps another."""
    times = service(
        reward_s=Constant(0.05),
        snapshot_s=Constant(0.02),
        stage_s=Constant(0.03),
        pause_s=Constant(0.01),
        commit_s=Constant(0.04),
        grant_s=0.005,
    )
    result = SimulatedRun(sizes(max_age=0), times).run()
    sampled = 0.005 + 10 * 0.1 + 0.05
    sent = 0.02 + 0.03 + 0.01 + 0.04
    assert result.wall_s == pytest.approx(20 * (sampled + 0.5) + 19 * sent)
    assert (result.age_mean, result.age_max, result.age_shares) == (0, 0, (1.0,))
    assert result.wasted_share == 0
    assert result.tokens_per_s == pytest.approx(4 * 2 * 10 / (sampled + 0.5 + sent))


def test_synchronous_steps_are_on_the_groups_in_their_order_whoever_made_them():
    run = SimulatedRun(
        sizes(generators=3, max_age=0), service(completion_tokens=LogNormal(10, 1.0, 80)), keep_batches=True
    )
    run.run()
    assert [step.ordinals for step in run.steps] == [tuple(range(4 * n, 4 * n + 4)) for n in range(20)]


def test_a_slow_learner_bounds_the_run_and_never_waits():
    result = SimulatedRun(sizes(generators=4, max_age=2, steps=50), service(step_s=Constant(3.0))).run()
    assert result.steps_per_s == pytest.approx(1 / 3.0, rel=1e-6)
    assert result.learner_idle_share == pytest.approx(0, abs=1e-9)
    assert result.generator_idle_share > 0.5


def test_a_slow_generator_bounds_the_run_by_its_decode_steps():
    """Its engine is never empty: 8 sequences of 10 tokens a second's worth of decode steps, 80 tokens a batch."""
    result = SimulatedRun(sizes(max_age=4, steps=200), service(step_s=Constant(0.01))).run()
    assert result.tokens_per_s == pytest.approx(8 / 0.1, rel=0.01)
    assert result.generator_idle_share < 0.02


def test_twice_the_generators_twice_the_tokens_where_they_bound_the_run():
    times = service(step_s=Constant(0.01))
    one = SimulatedRun(sizes(max_age=4, steps=200, groups_per_step=16), times).run()
    two = SimulatedRun(sizes(generators=2, max_age=4, steps=200, groups_per_step=16), times).run()
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=0.02)


@pytest.mark.parametrize("seed", range(12))
def test_no_token_is_older_than_max_age_and_none_is_thrown_away(seed):
    rng = random.Random(seed)
    given = sizes(
        generators=rng.randint(1, 9),
        max_sequences=rng.randint(1, 16),
        group_size=rng.randint(1, 4),
        groups_per_step=rng.randint(1, 8),
        max_age=rng.randint(0, 5),
        steps=60,
        cell_size=rng.randint(1, 4),
    )
    times = service(
        completion_tokens=LogNormal(20, 1.0, 150),
        decode_sequence_s=0.001,
        step_s=Measured((0.1, 0.5, 4.0)),
        reward_s=Measured((0.0, 0.3)),
        snapshot_s=Constant(0.02),
        stage_s=Measured((0.1, 3.0)),
        pause_s=Constant(0.05),
        commit_s=Constant(0.1),
        grant_s=0.01,
    )
    result = SimulatedRun(given, times, seed=seed).run()
    assert result.steps == 60 and result.age_max <= given.max_age
    assert sum(result.age_shares) == pytest.approx(1)
    assert 0 <= result.wasted_share < 0.5 and 0 <= result.learner_idle_share <= 1
    again = SimulatedRun(given, times, seed=seed).run()
    assert again == result, "equal arguments give equal runs"


def test_shared_cores_slow_both_sides_while_both_work():
    """Two cores, two threads a side: synchronous training never has both at work, asynchronous nearly always."""
    cores = SharedCores(cores=2, learner_threads=2, generator_threads=2)
    times = service(step_s=Constant(1.0))  # sampling a batch takes as long as training on it
    alone = SimulatedRun(sizes(max_age=0, steps=40), times).run()
    shared = SimulatedRun(sizes(max_age=0, steps=40), times, shared=cores).run()
    assert shared.wall_s == pytest.approx(alone.wall_s)
    overlapped = SimulatedRun(sizes(max_age=2, steps=40), times, shared=cores).run()
    assert overlapped.steps_per_s == pytest.approx(0.5, rel=0.05), (
        "two seconds of work for each step, whatever the order"
    )
    assert SimulatedRun(sizes(max_age=2, steps=40), times).run().steps_per_s == pytest.approx(1.0, rel=0.05)


def test_an_evaluation_takes_the_engine_before_the_next_batch_gets_it():
    """max_age=0: eight answers, then the eight rollouts of the batch, a second each."""
    times = service(step_s=Constant(0.5))
    without = SimulatedRun(sizes(max_age=0), times).run()
    each = SimulatedRun(sizes(max_age=0, eval_every=1, eval_prompts=8), times).run()
    assert without.wall_s == pytest.approx(20 * 1.5)
    assert each.wall_s == pytest.approx(20 * 1.5 + 19 * 1.0)
    sampled_twice = SimulatedRun(sizes(max_age=0, eval_every=4, eval_prompts=8, eval_samples=2), times).run()
    assert sampled_twice.wall_s == pytest.approx(20 * 1.5 + 4 * 2.0)  # of versions 4, 8, 12 and 16
    assert each.wasted_share == without.wasted_share == 0


def test_every_generator_that_answers_keeps_its_version_and_others_go_on():
    result = SimulatedRun(sizes(generators=12, eval_every=3, eval_prompts=40, max_age=3, steps=60), service()).run()
    assert result.steps == 60 and result.age_max <= 3
    fed = {"generators": 4, "max_age": 3, "steps": 60}  # 32 sequences at once: 64 answers take 2 s
    evaluated = SimulatedRun(sizes(**fed, eval_every=6, eval_prompts=64), service()).run()
    without = SimulatedRun(sizes(**fed), service()).run()
    # Were versions given up before all is answered, the first evaluation would never end and no other begin.
    assert evaluated.wall_s == pytest.approx(without.wall_s + 9 * 2.0, rel=0.05)


def test_training_stands_still_for_a_checkpoint_and_goes_on_while_it_is_written():
    fed = {"generators": 4, "max_age": 2, "steps": 40}
    times = service(step_s=Constant(3.0), checkpoint_s=Constant(1.0))
    assert SimulatedRun(sizes(**fed), times).run().steps_per_s == pytest.approx(1 / 3)
    assert SimulatedRun(sizes(**fed, checkpoint_every=1), times).run().steps_per_s == pytest.approx(1 / 4)
    assert SimulatedRun(sizes(**fed, checkpoint_every=2), times).run().steps_per_s == pytest.approx(1 / 3.5, rel=0.02)
    slow_disk = service(step_s=Constant(3.0), checkpoint_s=Constant(1.0), checkpoint_write_s=Constant(3.9))
    every_other = SimulatedRun(sizes(**fed, checkpoint_every=1), slow_disk).run()  # the next one waits for it
    assert every_other.steps_per_s == pytest.approx(1 / 3.5, rel=0.02)


def test_a_wider_bound_is_never_slower_where_times_are_constant():
    times = service(stage_s=Constant(0.2), pause_s=Constant(0.05), commit_s=Constant(0.1))
    rates = [SimulatedRun(sizes(max_age=age, steps=100), times).run().tokens_per_s for age in (0, 1, 2, 4)]
    assert rates == sorted(rates) and rates[1] > 1.2 * rates[0]


def test_a_slow_cell_costs_the_others_a_second_and_no_more():
    """Now and then a version takes one of two cells very long: the other gets on with newer ones."""
    times = service(stage_s=Measured((*[0.0] * 49, 20.0)), step_s=Constant(1.0))
    result = SimulatedRun(sizes(generators=8, max_age=8, steps=100, cell_size=4), times).run()
    assert result.steps_per_s > 0.9


def test_a_writer_of_checkpoints_takes_a_core_that_is_shared():
    shared = SharedCores(2, 2, 2)
    assert shared.pace(learner_works=True, generators_working=0, writers=1) == pytest.approx(2 / 3)
    fed = {"generators": 1, "max_age": 2, "steps": 40, "checkpoint_every": 1}
    free = SimulatedRun(sizes(**fed), service(), shared=shared).run()
    beside = SimulatedRun(sizes(**fed), service(checkpoint_write_s=Constant(0.4)), shared=shared).run()
    assert beside.steps_per_s < 0.95 * free.steps_per_s


def test_sizes_that_no_run_can_have_are_refused():
    with pytest.raises(ConfigError, match="generators=0"):
        SimulatedRun(sizes(generators=0), service())
    with pytest.raises(ConfigError, match="max_age=-1"):
        SimulatedRun(sizes(max_age=-1), service())


def test_the_mean_of_a_lognormal_law_that_is_cut_is_that_of_its_draws():
    law = LogNormal(64, 1.0, 448)
    rng = random.Random(0)
    draws = [law.draw(rng) for _ in range(200_000)]
    assert max(draws) <= 448
    assert law.mean == pytest.approx(sum(draws) / len(draws), rel=0.01)
    assert LogNormal(64, 0.0, 448).mean == 64


@pytest.mark.slow
def test_ten_thousand_generators_are_simulated_for_a_thousand_steps_within_a_minute():
    """By CPU time, which is longer where other tests run beside it: fewer steps may take half a minute."""
    steps, limit_s = usual(300, full=1000), usual(30, full=60)
    times = service(
        completion_tokens=LogNormal(500, 1.0, 4000),
        decode_s=0.02,
        step_s=Constant(5.0),
        stage_s=Measured((0.5, 1.0, 2.0)),
        pause_s=Constant(0.1),
        commit_s=Constant(0.1),
    )
    given = sizes(generators=10_000, max_sequences=64, group_size=8, groups_per_step=64, max_age=4, steps=steps)
    began = time.process_time()
    result = SimulatedRun(given, times).run()
    assert time.process_time() - began < limit_s
    assert result.steps == steps and result.age_max <= 4

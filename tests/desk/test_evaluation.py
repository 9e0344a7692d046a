"""When a version is evaluated, on what, and what is reported of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.desk.acknowledgements import Evaluated
from asyncrl.desk.evaluation import EvalResults, Evaluator, evaluation_due
from asyncrl.report.rollouts.choice import Why
from asyncrl.types import LeaseKind
from tests.desk.desk_parts import MetricsLog, RolloutJobs, eval_group, make_parts, make_rollout, small_config

PROMPTS = 3


class Results:
    """Stands for `Acknowledgements`: each result counts once it is durable."""

    def __init__(self):
        self.accepted = []
        self.durable = []
        self.times_made_durable = 0

    def make_durable(self):
        self.times_made_durable += 1
        self.durable += self.accepted
        self.accepted = []

    def take_evaluated(self):
        durable, self.durable = self.durable, []
        return durable


class World:
    """A desk's leases and one evaluator."""

    def __init__(self, folder, done=()):
        self.parts = make_parts(folder, small_config(eval__every=2, eval__prompts=PROMPTS))
        self.log = MetricsLog()
        self.results = Results()
        self.rollouts = RolloutJobs()
        self.evaluator = Evaluator(
            self.parts.config,
            num_prompts=PROMPTS,
            leases=self.parts.leases,
            acknowledgements=self.results,
            metrics=self.log,
            done=set(done),
            prompts=self.parts.prompts,
            rollouts=self.rollouts,
        )

    def answer(self, version, rewards, now=0.0):
        """One generator that holds `version` answers as many prompts as there are rewards."""
        granted = self.parts.leases.grant("g", version, len(rewards), version, now)
        for reward, record in zip(rewards, granted, strict=True):
            group = eval_group(
                record.key.ordinal, prompt=40, version=version, reward=reward, attempt=record.key.attempt
            )
            self.parts.leases.accept(group.key)
            self.results.accepted.append(Evaluated(group, "g"))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.parts.journal.close()


def test_start_end_and_every_so_many_steps_in_between_are_due_once():
    due = [version for version in range(8) if evaluation_due(version, last_step=7, every=3, prompts=1, done={3})]
    assert due == [0, 6, 7]
    assert [version for version in range(8) if evaluation_due(version, 7, 0, 1, set())] == [0, 7]
    assert not any(evaluation_due(version, 7, 1, 0, set()) for version in range(8))


def test_an_evaluation_starts_with_the_first_proven_version_at_or_above_the_due_one(world):
    world.evaluator.advance(2, {1})
    world.evaluator.version_proven(1, 0.0)
    assert world.parts.leases.evaluation is None
    world.evaluator.version_proven(3, 0.0)
    assert world.parts.leases.evaluation.version == 3
    assert not world.evaluator.idle


def test_its_figures_are_means_over_all_prompts_once_all_are_answered(world):
    world.evaluator.advance(0, {0})
    world.evaluator.version_proven(0, 0.0)
    world.answer(0, [1.0, 0.0, 0.5])
    assert world.log.evals == []
    world.evaluator.advance(0, {0})
    (figures,) = world.log.evals
    assert (figures.version, figures.prompts, figures.prompts_failed, figures.reward_mean) == (0, 3, 0, 0.5)
    assert figures.reward_parts == {"exact": 0.5}
    assert figures.completion_tokens_mean == 3.0
    assert world.results.times_made_durable == 1
    assert world.evaluator.idle


def test_prompts_that_got_no_reward_are_counted_and_are_no_zeros():
    evaluation = EvalResults(4, first_ordinal=0, num_prompts=3)
    assert evaluation.metrics() is None
    evaluation.add(eval_group(0, prompt=40, reward=1.0))
    evaluation.add(eval_group(0, prompt=40, reward=0.0))  # the first result of a prompt counts
    figures = evaluation.metrics()
    assert (figures.prompts, figures.prompts_failed, figures.reward_mean) == (1, 2, 1.0)


def test_an_evaluation_that_nobody_can_finish_is_repeated_with_a_later_version(world):
    """The only generator that held the version died."""
    world.evaluator.advance(0, {0})
    world.evaluator.version_proven(0, 0.0)
    world.answer(0, [1.0])
    world.parts.leases.release("g", 0.0)
    world.evaluator.advance(1, {None})
    assert world.log.evals == []
    assert not world.evaluator.idle
    world.evaluator.version_proven(1, 0.0)
    world.answer(1, [0.0, 0.0, 0.0])
    world.evaluator.advance(1, {1})
    (figures,) = world.log.evals
    assert (figures.version, figures.prompts, figures.reward_mean) == (1, 3, 0.0), "the first result is of another one"


def test_what_was_answered_of_an_evaluation_that_is_given_up_is_reported(world):
    world.evaluator.advance(0, {0})
    assert world.evaluator.describe() == "the evaluation of version 0 waits for a generator that proves it"
    world.evaluator.version_proven(0, 0.0)
    world.answer(0, [1.0])
    world.results.make_durable()
    world.evaluator.advance(0, {0})
    assert world.evaluator.describe() == "evaluation of version 0: 1 of 3 prompts are answered"
    world.answer(0, [0.0])  # not durable yet
    world.evaluator.give_up()
    assert [(figures.prompts, figures.prompts_failed) for figures in world.log.evals] == [(2, 1)]
    assert world.evaluator.idle


def test_the_answers_to_the_first_prompts_are_written_each_time_with_what_the_reward_got(world):
    world.parts.config.log.rollouts_per_eval = 2
    for version in (0, 2):
        world.evaluator.advance(version, {version})
        world.evaluator.version_proven(version, 0.0)
        world.answer(version, [1.0, 0.0, 0.5])
        world.evaluator.advance(version, {version})
    assert [(job.kind, job.version) for job in world.rollouts.jobs] == [(LeaseKind.EVAL, 0), (LeaseKind.EVAL, 2)]
    for job in world.rollouts.jobs:
        kept = [entry.rollout for entry in job.rollouts]
        assert [(rollout.ordinal, rollout.why) for rollout in kept] == [(0, Why.EVALUATED), (1, Why.EVALUATED)]
        assert [rollout.rollout.reward for rollout in kept] == [1.0, 0.0]
        assert [(entry.generator, entry.payload) for entry in job.rollouts] == [("g", {"index": -1})] * 2


def test_of_an_evaluation_that_was_cut_short_what_was_answered_is_written(world):
    world.evaluator.advance(0, {0})
    world.evaluator.version_proven(0, 0.0)
    world.answer(0, [1.0])
    world.evaluator.give_up()
    (job,) = world.rollouts.jobs
    assert [entry.rollout.ordinal for entry in job.rollouts] == [0]


def test_while_it_runs_training_goes_on_and_a_later_evaluation_waits_its_turn(world):
    world.evaluator.advance(0, {0})
    world.evaluator.version_proven(0, 0.0)
    world.evaluator.advance(2, {0})
    world.evaluator.version_proven(2, 0.0)
    assert world.parts.leases.evaluation.version == 0
    world.answer(0, [1.0] * 3)
    world.evaluator.advance(2, {0})
    world.evaluator.version_proven(2, 0.0)
    assert world.parts.leases.evaluation.version == 2


def test_what_was_evaluated_before_a_restart_is_not_evaluated_again(tmp_path):
    world = World(tmp_path, done={0})
    world.evaluator.advance(0, {0})
    assert world.evaluator.idle
    world.parts.journal.close()


# -- several completions of each prompt --------------------------------------------------------------------------------


def sampled(ordinal: int, *rewards: float):
    """A result with a completion for each reward."""
    group = eval_group(ordinal, prompt=40)
    group.rollouts = [make_rollout(reward) for reward in rewards]
    return group


def test_of_several_completions_the_mean_and_the_best_of_each_prompt_are_reported():
    evaluation = EvalResults(4, first_ordinal=0, num_prompts=4, temperature=0.7)
    for ordinal, rewards in enumerate([(0.0, 1.0), (0.0, 0.0), (0.5, 0.25)]):
        evaluation.add(sampled(ordinal, *rewards))
    figures = evaluation.metrics()
    assert (figures.prompts, figures.prompts_failed, figures.samples, figures.temperature) == (3, 1, 2, 0.7)
    assert figures.reward_mean == pytest.approx(1.75 / 6)
    assert figures.reward_parts == {"exact": pytest.approx(1.75 / 6)}
    assert figures.reward_best_mean == pytest.approx(0.5)
    assert figures.reward_parts_best == {"exact": pytest.approx(0.5)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_best_of_a_part_that_is_0_or_1_is_pass_at_k(rewards):
    evaluation = EvalResults(0, first_ordinal=0, num_prompts=len(rewards))
    for ordinal, each in enumerate(rewards):
        evaluation.add(sampled(ordinal, *each))
    figures = evaluation.metrics()
    assert figures.reward_parts_best["exact"] == pytest.approx(sum(any(each) for each in rewards) / len(rewards))
    assert figures.reward_mean == pytest.approx(sum(map(sum, rewards)) / (3 * len(rewards)))


def test_the_best_of_a_part_counts_the_completions_that_have_it():
    evaluation = EvalResults(0, first_ordinal=0, num_prompts=2)
    group = sampled(0, 0.0, 0.0)
    group.rollouts[0].reward_parts = {"math/exact": -1.0}
    group.rollouts[1].reward_parts = {"math/exact": -2.0, "extra": 3.0}
    evaluation.add(group)
    assert evaluation.metrics().reward_parts_best == {"extra": 3.0, "math/exact": -1.0}


def test_of_one_completion_there_is_no_best():
    evaluation = EvalResults(0, first_ordinal=0, num_prompts=1)
    evaluation.add(sampled(0, 1.0))
    figures = evaluation.metrics()
    assert (figures.samples, figures.reward_best_mean, figures.reward_parts_best) == (1, None, {})

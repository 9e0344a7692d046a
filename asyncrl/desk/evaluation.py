"""Evaluation of one policy version on held-out prompts, carried by leases marked `eval`.

Training does not stop for it: the generators that hold the version answer its leases between their training leases, and
only their next weight swap waits (`LeaseBook.eval_holders`). Every token of a result comes from the version it reports.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from asyncrl.config import Config
from asyncrl.desk.acknowledgements import Acknowledgements, Evaluated
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.metrics import EvalMetrics, Metrics
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.report.rollouts.jobs import JobEntry, RolloutJob
from asyncrl.report.rollouts.records import kept_answers
from asyncrl.report.rollouts.writer import RolloutWriter
from asyncrl.types import Group, LeaseKind, means_of_parts

log = logging.getLogger(__name__)


class EvalAnswer(NamedTuple):
    """What is kept of one completion of an evaluation."""

    reward: float
    parts: dict[str, float]
    num_tokens: int


@dataclass(slots=True)
class EvalResults:
    """Results of the evaluation of one version as they come in. Its prompts have the ordinals from first_ordinal on."""

    version: int
    first_ordinal: int
    num_prompts: int
    temperature: float = 0.0
    num_kept: int = 0  # the answers to so many prompts, from the first on, are kept
    answers: dict[int, list[EvalAnswer]] = field(default_factory=dict)  # ordinal -> its completions
    kept: dict[int, Evaluated] = field(default_factory=dict)  # by place

    def add(self, group: Group, generator_id: str = "") -> None:
        """Counts the first result of each prompt; those of an evaluation before this one are left out."""
        ordinal = group.key.ordinal
        place = ordinal - self.first_ordinal
        if ordinal in self.answers or not 0 <= place < self.num_prompts:
            return
        if place < self.num_kept:
            self.kept[place] = Evaluated(group, generator_id)
        self.answers[ordinal] = [
            EvalAnswer(rollout.reward, rollout.reward_parts, rollout.num_tokens) for rollout in group.rollouts
        ]

    def metrics(self) -> EvalMetrics | None:
        """Means over the prompts that were answered; None if none was. Prompts that failed do not count as zeros."""
        count = len(self.answers)
        if count == 0:
            return None
        every = [answer for answers in self.answers.values() for answer in answers]
        samples = len(every) // count
        several = list(self.answers.values()) if samples > 1 else []
        best = [max(answer.reward for answer in answers) for answers in several]
        return EvalMetrics(
            version=self.version,
            prompts=count,
            samples=samples,
            temperature=self.temperature,
            prompts_failed=self.num_prompts - count,
            reward_mean=math.fsum(answer.reward for answer in every) / len(every),
            reward_parts=means_of_parts(answer.parts for answer in every),
            reward_best_mean=math.fsum(best) / count if best else None,
            reward_parts_best=means_of_parts(_best_parts(answers) for answers in several),
            completion_tokens_mean=sum(answer.num_tokens for answer in every) / len(every),
        )


def _best_parts(answers: Iterable[EvalAnswer]) -> dict[str, float]:
    """The best value of each part over the completions of one prompt."""
    best: dict[str, float] = {}
    for answer in answers:
        for name, value in answer.parts.items():
            best[name] = max(value, best.get(name, value))
    return best


def evaluation_due(version: int, last_step: int, every: int, prompts: int, done: set[int]) -> bool:
    """Whether `version` is to be evaluated: the first, the last and each `every`-th one, unless it is in `done`.

    every is in steps, 0 for none in between; nothing is due without held-out prompts.
    """
    if prompts == 0 or version in done:
        return False
    return version in (0, last_step) or (every > 0 and version % every == 0)


class Evaluator:
    """Decides when a version is evaluated, and collects what comes back.

    An evaluation that is due starts with the first version, at or above the due one, that a generator proves: versions
    in between may never reach a generator. While it runs, generators that hold its version keep it. `done` are the
    versions whose evaluation was asked for; it is changed here, and saved with the run's state. num_prompts is None
    where the held-out prompts are still to be made (`prompts_are_there`). rollouts writes the answers to the first of
    `prompts`; without one of the two none are written.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_prompts: int | None,
        leases: LeaseBook,
        acknowledgements: Acknowledgements,
        metrics: Metrics,
        done: set[int],
        prompts: LeasedPrompts | None = None,
        rollouts: RolloutWriter | None = None,
    ) -> None:
        self._config = config
        self._num_prompts = num_prompts  # None until they are made
        self._proven_too_early: int | None = None  # the newest version that was proven before that
        self._leases = leases
        self._acknowledgements = acknowledgements
        self._metrics = metrics
        self._done = done
        self._prompts = prompts
        self._rollouts = rollouts
        self._due: int | None = None
        self._running: EvalResults | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is due and nothing runs."""
        return self._due is None and self._running is None

    def advance(self, version: int, held_versions: Container[int | None]) -> None:
        """Notes what is due at the newest `version`, takes in results that became durable, ends what is complete.

        held_versions are those that generators hold, proven.
        """
        count = self._config.eval.prompts if self._num_prompts is None else self._num_prompts
        if evaluation_due(version, self._config.run.steps, self._config.eval.every, count, self._done):
            self._done.add(version)
            self._due = version
        self._collect()
        leased = self._leases.evaluation
        if self._running is None or leased is None:
            return
        if not leased.done and not leased.running and self._running.version not in held_versions:
            # The generators that held it died or were reloaded: the prompts that are left can never be answered.
            log.warning("evaluation of version %d: no generator holds it any more; repeated", self._running.version)
            self._leases.abandon_eval()
            self._due, self._running = version, None
        elif leased.done:
            self._finish()

    def describe(self) -> str:
        """What the evaluation waits for, in words for the log."""
        if self._running is not None:
            answered = f"{len(self._running.answers)} of {self._num_prompts} prompts are answered"
            return f"evaluation of version {self._running.version}: {answered}"
        if self._due is not None and self._num_prompts is None:
            return f"the evaluation of version {self._due} waits for its prompts"
        if self._due is not None:
            return f"the evaluation of version {self._due} waits for a generator that proves it"
        return "no evaluation is due"

    def give_up(self) -> None:
        """Ends what is due or runs; what was answered until now is reported."""
        self._leases.abandon_eval()
        if self._running is not None:
            self._finish()
        self._due = None

    def version_proven(self, version: int, now: float) -> None:
        """A generator holds `version` now: the moment to evaluate it."""
        if self._num_prompts is None:
            self._proven_too_early = version
            return
        if self._due is None or self._running is not None or version < self._due:
            return
        self._due = None
        leased = self._leases.start_eval(version, self._num_prompts, self._config.generator.lease_timeout_s, now)
        temperature = self._config.eval.temperature
        num_kept = 0 if self._rollouts is None else self._config.log.rollouts_per_eval
        self._running = EvalResults(version, leased.first_ordinal, self._num_prompts, temperature, num_kept)

    def prompts_are_there(self, count: int, now: float) -> None:
        """The held-out prompts are made, `count` of them; asked again, this changes nothing."""
        if self._num_prompts is not None:
            return
        self._num_prompts = count
        if count == 0:
            self._due = None
        elif self._proven_too_early is not None:
            self.version_proven(self._proven_too_early, now)

    def _collect(self) -> None:
        for group, generator_id in self._acknowledgements.take_evaluated():
            if self._running is not None:
                self._running.add(group, generator_id)

    def _finish(self) -> None:
        assert self._running is not None
        self._acknowledgements.make_durable()  # results that were accepted but are not on disk yet belong to it too
        self._collect()
        results, self._running = self._running, None
        if (figures := results.metrics()) is None:
            log.error("evaluation of version %d got no result at all", results.version)
        else:
            self._metrics.log_eval(figures)
            self._write(results)

    def _write(self, results: EvalResults) -> None:
        """Has the answers written that were kept, in the order of their prompts."""
        if self._rollouts is None or self._prompts is None:
            return
        entries = [
            JobEntry(kept, generator_id, self._prompts.held_out_payload(place))
            for place, (group, generator_id) in sorted(results.kept.items())
            for kept in kept_answers(group, place)
        ]
        self._rollouts.write(RolloutJob(LeaseKind.EVAL, results.version, entries))

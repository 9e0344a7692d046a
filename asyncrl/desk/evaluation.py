"""Greedy evaluation of one policy version on held-out prompts, carried by leases marked `eval`.

Training does not stop for it: the generators that hold the version answer its leases between their training leases, and
only their next weight swap waits (`LeaseBook.eval_holders`). Every token of a result comes from the version it reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncrl.config import Config
from asyncrl.metrics import EvalMetrics, Metrics
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.types import Group

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Evaluation:
    """Results of the evaluation of one version as they come in."""

    version: int
    num_prompts: int
    started: float
    rewards: dict[int, float] = field(default_factory=dict)  # ordinal -> reward
    parts: dict[int, dict[str, float]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def add(self, group: Group) -> None:
        """Counts the first result of each prompt."""
        ordinal = group.key.ordinal
        if ordinal in self.rewards:
            return
        rollout = group.rollouts[0]
        self.rewards[ordinal] = rollout.reward
        self.parts[ordinal] = rollout.reward_parts
        self.lengths[ordinal] = rollout.num_tokens

    def metrics(self) -> EvalMetrics | None:
        """Means over the prompts that were answered; None if none was. Prompts that failed are not zeros."""
        count = len(self.rewards)
        if count == 0:
            return None
        names = sorted({name for parts in self.parts.values() for name in parts})
        return EvalMetrics(
            version=self.version,
            prompts=count,
            prompts_failed=self.num_prompts - count,
            reward_mean=sum(self.rewards.values()) / count,
            reward_parts={name: sum(parts.get(name, 0.0) for parts in self.parts.values()) / count for name in names},
            completion_tokens_mean=sum(self.lengths.values()) / count,
        )


def evaluation_due(version: int, last_step: int, every: int, prompts: int, done: set[int]) -> bool:
    """Start, end and every `every` steps in between, once each."""
    if prompts == 0 or version in done:
        return False
    return version in (0, last_step) or (every > 0 and version % every == 0)


class Evaluator:
    """Decides when a version is evaluated, and collects what comes back.

    An evaluation that is due starts with the first version, at or above the due one, that a generator proves: versions
    in between may never reach a generator. While it runs, generators that hold its version keep it.
    """

    def __init__(
        self,
        config: Config,
        num_prompts: int,
        leases: LeaseBook,
        metrics: Metrics,
        make_durable: Callable[[], object],
        done: set[int],
    ) -> None:
        self.done = done  # versions whose evaluation was asked for
        self._config = config
        self._num_prompts = num_prompts
        self._leases = leases
        self._metrics = metrics
        self._make_durable = make_durable
        self._due: int | None = None
        self._running: Evaluation | None = None

    @property
    def idle(self) -> bool:
        """Nothing is due and nothing runs."""
        return self._due is None and self._running is None

    def advance(self, version: int, held_versions: set[int | None]) -> None:
        """Called with the newest version and those that generators hold: notes what is due, ends what is complete."""
        if evaluation_due(version, self._config.run.steps, self._config.eval.every, self._num_prompts, self.done):
            self.done.add(version)
            self._due = version
        leased = self._leases.evaluation
        if self._running is None or leased is None:
            return
        if not leased.done and not leased.running and self._running.version not in held_versions:
            # The generators that held it died or were reloaded: what is left can never be answered.
            log.warning("evaluation of version %d: no generator holds it any more; repeated", self._running.version)
            self._leases.abandon_eval()
            self._due, self._running = version, None
        elif leased.done:
            self._make_durable()  # results that were accepted but are not on disk yet belong to it too
            self._finish()

    def describe(self) -> str:
        """What it waits for, for the log."""
        if self._running is not None:
            answered = f"{len(self._running.rewards)} of {self._num_prompts} prompts are answered"
            return f"evaluation of version {self._running.version}: {answered}"
        if self._due is not None:
            return f"the evaluation of version {self._due} waits for a generator that proves it"
        return "no evaluation is due"

    def give_up(self) -> None:
        """Ends what is due or runs; what was answered until now is reported."""
        self._leases.abandon_eval()
        if self._running is not None:
            self._make_durable()
            self._finish()
        self._due = None

    def version_proven(self, version: int, now: float) -> None:
        """A generator holds `version` now: the moment to evaluate it."""
        if self._due is None or self._running is not None or version < self._due:
            return
        self._due = None
        self._running = Evaluation(version, self._num_prompts, now)
        self._leases.start_eval(version, self._num_prompts, self._config.generator.lease_timeout_s, now)

    def add(self, group: Group) -> None:
        """A result of the evaluation, durable now."""
        if self._running is not None:
            self._running.add(group)

    def _finish(self) -> None:
        assert self._running is not None
        figures, version, self._running = self._running.metrics(), self._running.version, None
        if figures is None:
            log.error("evaluation of version %d got no result at all", version)
        else:
            self._metrics.log_eval(figures)

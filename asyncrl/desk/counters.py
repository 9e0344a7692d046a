"""Adds up what generators and trainer report, and turns it into one StepMetrics per step.

Generators report cumulative counters per incarnation; rates are differences over the time between two steps. A
generator that restarts starts again at zero: what its new incarnation reports counts from there, so nothing is lost
and no sum falls. The same holds of the time of a trainer that dies; what it did since its last report, and the time
until the next one begins, is `restart`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from asyncrl.link.limits import MAX_GENERATORS
from asyncrl.link.messages import Beat
from asyncrl.link.trainer_messages import StepDone
from asyncrl.metrics import StepMetrics, SyncMetrics
from asyncrl.metrics.ledger import GeneratorActivity, LearnerActivity, add, known_seconds, since
from asyncrl.metrics.types import AGE_PART, REWARD_PART
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.storage.records import StoredGroup
from asyncrl.weights.plan.records import Committed, RoundEnded

MAX_GRANT_AGE = 127  # what is older counts as this
LengthsOfGrant = tuple[int, int, int]  # of a group: the version of its lease, how many rollouts, how many tokens


@dataclass(slots=True)
class RunTotals:
    """Sums over the whole run; checkpoints carry them over a restart of the learner."""

    rollouts_acked: int = 0
    rollouts_dropped: int = 0
    groups_filtered: int = 0
    tokens_filtered: int = 0
    rollouts_failed: dict[str, int] = field(default_factory=dict)  # by reason
    prompts_left_out: int = 0


@dataclass(slots=True)
class GeneratorTotals:
    """What generators did: tokens sampled, seconds busy and idle, seconds by activity, and CPU seconds."""

    tokens_generated: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0
    time_s: dict[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0


class Counters:
    """`totals` are those of the run so far. Each call of `step_metrics` reports what came since the one before."""

    def __init__(self) -> None:
        self.totals = RunTotals()
        self._reported = RunTotals()  # the totals at the last step
        self._generators = GeneratorTotals()  # since the last step
        self._newest: dict[str, tuple[int, GeneratorTotals]] = {}  # generator -> (incarnation, its newest report)
        self._engine_step_ms: dict[str, dict[str, float]] = {}  # of generators that beat since the last step
        self._trainer: dict[str, float] = {}  # the newest report of the trainer that lives: its time by activity
        self._trainer_lost = False  # since the last step
        self._overlapped: dict[str, float] = {}  # since the last step
        self._came_in: list[LengthsOfGrant] = []  # since the last step
        self._trained: dict[int, list[LengthsOfGrant]] = {}  # version that a batch makes -> its groups
        self._gap_engine: float | None = None  # mean canary difference of the newest sync that somebody committed

    def state(self) -> RunTotals:
        """What a checkpoint must hold; it does not change with these counters."""
        return copy.deepcopy(self.totals)

    def restore(self, totals: RunTotals) -> None:
        """Goes on from `totals`; what was counted there was reported already."""
        self.totals = copy.deepcopy(totals)
        self._reported = copy.deepcopy(totals)

    def beat(self, name: str, incarnation: int, beat: Beat) -> None:
        """Takes in a beat. Of a generator that was not known, counting starts with its first one."""
        time_s = known_seconds(beat.time_s, GeneratorActivity)
        report = GeneratorTotals(beat.tokens_generated, beat.busy_s, beat.idle_s, time_s, beat.cpu_s)
        self._engine_step_ms[name] = beat.engine_step_ms
        known = self._newest.pop(name, None)
        self._newest[name] = (incarnation, report)  # behind all others: heard of last
        if len(self._newest) > MAX_GENERATORS:
            oldest = next(iter(self._newest))
            del self._newest[oldest]
            self._engine_step_ms.pop(oldest, None)
        if known is None:
            return
        before = known[1] if known[0] == incarnation else GeneratorTotals()
        # Cumulative, so they never fall; a report that says so is wrong, and no sum here is to fall with it.
        self._generators.tokens_generated += max(0, report.tokens_generated - before.tokens_generated)
        self._generators.busy_s += max(0.0, report.busy_s - before.busy_s)
        self._generators.idle_s += max(0.0, report.idle_s - before.idle_s)
        self._generators.cpu_s += max(0.0, report.cpu_s - before.cpu_s)
        add(self._generators.time_s, since(before.time_s, report.time_s))

    def lease_failed(self, reason: str, num_rollouts: int) -> None:
        """A lease ended without a group, and its rollouts are lost."""
        self.totals.rollouts_failed[reason] = self.totals.rollouts_failed.get(reason, 0) + num_rollouts

    def came_in(self, issued_version: int, num_tokens: Sequence[int]) -> None:
        """A group was accepted, filtered or not: the version of its lease, and the tokens of each completion."""
        self._came_in.append((issued_version, len(num_tokens), sum(num_tokens)))

    def batch_decided(self, version: int, batch: Sequence[StoredGroup]) -> None:
        """These groups will make `version`."""
        self._trained[version] = [
            (group.issued_version, len(group.num_tokens), sum(group.num_tokens)) for group in batch
        ]

    def trainer_lost(self) -> None:
        """The trainer died; the next one counts its time from zero."""
        self._trainer, self._trainer_lost = {}, True

    def checkpoint_saved(self, seconds: float) -> None:
        """A checkpoint took so long, beside training."""
        add(self._overlapped, {"checkpoint": seconds})

    def _learner_time(self, time_s: dict[str, float], interval_s: float) -> dict[str, float]:
        """By activity, the time since the last step that was reported; `time_s` is the trainer's own, since its start.

        Where nothing is known of that, as of a trainer that died while its report was on its way, it is lost. Waiting
        beyond a trainer's first interval is from before a generator could work: start-up, and no wait for data.
        """
        if not time_s:
            return {str(LearnerActivity.RESTART): interval_s} if self._trainer_lost else {}
        report = known_seconds(time_s, LearnerActivity)
        spent, self._trainer = since(self._trainer, report), report
        if self._trainer_lost:
            self._trainer_lost = False
            add(spent, since({}, {str(LearnerActivity.RESTART): interval_s - sum(spent.values())}))
        waited_s = spent.get(LearnerActivity.DATA, 0.0)
        early_s = waited_s - max(0.0, interval_s)
        if LearnerActivity.START in spent and early_s > 0.0:
            spent[str(LearnerActivity.DATA)] = waited_s - early_s
            add(spent, {str(LearnerActivity.START): early_s})
        return spent

    def step_metrics(
        self,
        done: StepDone,
        interval_s: float,
        buffer: ReplayBuffer,
        num_alive: int,
        learner_cpu_s: float | None = None,
    ) -> StepMetrics:
        """Everything since the previous step, joined with what the trainer measured in this one.

        interval_s is the time since the previous step, num_alive the number of generators whose beats come,
        learner_cpu_s the learner's CPU time since the previous step.
        """
        learner_time_s = self._learner_time(done.time_s, interval_s)
        generators, self._generators = self._generators, GeneratorTotals()
        overlapped_s, self._overlapped = self._overlapped, {}
        engine_step_ms, self._engine_step_ms = _means(self._engine_step_ms.values()), {}
        before, self._reported = self._reported, copy.deepcopy(self.totals)
        totals = self.totals
        parts, figures = _split_off(REWARD_PART, done.metrics)
        by_age, figures = _split_off(AGE_PART, figures)
        came_in, self._came_in = self._came_in, []
        trained = self._trained.get(done.version, [])  # none of a batch that was decided before a restart
        self._trained = {version: groups for version, groups in self._trained.items() if version > done.version}
        return StepMetrics.of_step(
            figures,
            reward_parts=parts,
            age_health=_nested(by_age),
            gap_engine=self._gap_engine,
            gap_drift=_drift(figures.get("logprob_gap"), self._gap_engine),
            version=done.version,
            interval_s=interval_s,
            step_s=done.step_s,
            learner_time_s=learner_time_s,
            generator_time_s=generators.time_s,
            engine_step_ms=engine_step_ms,
            overlapped_s=overlapped_s,
            learner_idle_s=min(learner_time_s.get(LearnerActivity.DATA, 0.0), interval_s),
            tokens_generated=generators.tokens_generated,
            generator_busy_s=generators.busy_s,
            generator_idle_s=generators.idle_s,
            learner_cpu_s=learner_cpu_s,
            generator_cpu_s=generators.cpu_s,
            rollouts_acked=totals.rollouts_acked - before.rollouts_acked,
            rollouts_dropped=totals.rollouts_dropped - before.rollouts_dropped,
            groups_filtered=totals.groups_filtered - before.groups_filtered,
            tokens_filtered=totals.tokens_filtered - before.tokens_filtered,
            prompts_left_out=totals.prompts_left_out - before.prompts_left_out,
            dropped_by_length_decile=[round(count) for count in buffer.dropped_by_length_decile()],
            came_in_by_grant_age=_by_grant_age(came_in, done.version - 1),
            trained_by_grant_age=_by_grant_age(trained, done.version - 1),
            rollouts_failed={
                reason: count - before.rollouts_failed.get(reason, 0)
                for reason, count in totals.rollouts_failed.items()
            },
            buffer_groups=len(buffer),
            buffer_bytes=buffer.num_bytes,
            generators_alive=num_alive,
        )

    def sync_metrics(self, ended: RoundEnded) -> SyncMetrics:
        """One round of weight sync; each time is that of the slowest generator."""
        committed = ended.committed
        stage_ms = sum(receiver.timings_ms.get("stage_ms", 0.0) for receiver in committed)
        took_ms = {"encode": ended.encode_ms, "transfer": ended.transfer_ms, "stage": stage_ms}
        add(self._overlapped, {work: ms / 1e3 for work, ms in took_ms.items() if ms > 0.0})
        canary_means = [c.canary_mean_diff for c in committed]
        if canary_means:
            self._gap_engine = fmean(canary_means)
        slowest_ms = _slowest_ms(committed)
        return SyncMetrics(
            version=ended.version,
            total_ms=ended.total_ms,
            generators_committed=len(committed),
            generators_failed=len(ended.failed),
            members=sorted([*(c.name for c in committed), *ended.failed]),
            retries=ended.retries,
            catch_up=ended.catch_up,
            apply=_apply(committed),
            snapshot_ms=ended.snapshot_ms or None,
            encode_ms=ended.encode_ms or None,
            transfer_ms=ended.transfer_ms or None,
            transfer_gb_per_s=_gb_per_s(ended.num_bytes, slowest_ms.get("receive_ms")),
            **{name: slowest_ms.get(name) for name in _TIMED},
            encoding=("dense" if ended.base_version is None else "delta") if ended.num_bytes else None,
            num_bytes=ended.num_bytes or None,
            dense_bytes=ended.dense_bytes or None,
            canary_max_abs_diff=max((c.canary_max_diff for c in committed), default=None),
            canary_mean_abs_diff=fmean(canary_means) if canary_means else None,
        )


# What generators time themselves.
_TIMED = ("receive_ms", "decode_ms", "verify_ms", "prepare_ms", "stage_ms", "pause_ms", "canary_ms")


def _split_off(prefix: str, metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The figures whose names begin with `prefix`, under the rest of their names; and all other figures."""
    parts = {name: value for name, value in metrics.items() if name.startswith(prefix)}
    others = {name: value for name, value in metrics.items() if name not in parts}
    return {name.removeprefix(prefix): value for name, value in parts.items()}, others


def _by_grant_age(groups: Iterable[LengthsOfGrant], version: int) -> dict[str, dict[str, int]]:
    """Rollouts and tokens by how many versions before `version` their leases were granted, youngest first."""
    sums: dict[int, dict[str, int]] = {}
    for issued_version, num_rollouts, num_tokens in groups:
        age = min(max(0, version - issued_version), MAX_GRANT_AGE)
        known = sums.setdefault(age, {"rollouts": 0, "tokens": 0})
        known["rollouts"] += num_rollouts
        known["tokens"] += num_tokens
    return {str(age): sums[age] for age in sorted(sums)}


def _nested(by_age: dict[str, float]) -> dict[str, dict[str, float]]:
    """BUCKET/NAME → value as bucket → name → value."""
    nested: dict[str, dict[str, float]] = {}
    for path, value in by_age.items():
        bucket, _, name = path.partition("/")
        nested.setdefault(bucket, {})[name] = value
    return nested


def _means(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, the mean over those that have it."""
    figures: dict[str, list[float]] = {}
    for each in parts:
        for name, value in each.items():
            figures.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in figures.items()}


def _apply(committed: Sequence[Committed]) -> str | None:
    """How the engines took the weights: "reload" when any of them did; None when nobody said."""
    told = {name for c in committed for name in c.timings_ms}
    return next((kind for kind in ("reload", "direct") if f"{kind}_ms" in told), None)


def _slowest_ms(committed: Sequence[Committed]) -> dict[str, float]:
    """The longest time that any generator reported, by name of the phase."""
    slowest: dict[str, float] = {}
    for receiver in committed:
        for name, value in receiver.timings_ms.items():
            slowest[name] = max(value, slowest.get(name, value))
    return slowest


def _gb_per_s(num_bytes: int, ms: float | None) -> float | None:
    return num_bytes / ms / 1e6 if num_bytes and ms else None


def _drift(logprob_gap: float | None, gap_engine: float | None) -> float | None:
    """How much of the log-prob gap is the policy's own drift, in nats: what the engine's part does not explain.

    A lower bound: engine and policy may change a token's log-prob in opposite directions, so that the two parts
    together exceed the gap. None when either figure was not measured.
    """
    if logprob_gap is None or gap_engine is None:
        return None
    return max(0.0, logprob_gap - gap_engine)

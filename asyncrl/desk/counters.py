"""Adds up what generators and trainer report, and turns it into one StepMetrics per step.

Generators report cumulative counters per incarnation; rates are differences over the time between two steps. A
generator that restarts starts again at zero, so totals are kept per (generator, incarnation) and never fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from asyncrl.link.messages import Beat, StepDone
from asyncrl.metrics import StepMetrics, SyncMetrics
from asyncrl.metrics.types import AGE_PART, REWARD_PART
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.weights.plan.records import Committed, RoundEnded


@dataclass(slots=True)
class GeneratorTotals:
    """Sums over all generators and incarnations."""

    tokens_generated: int = 0
    rollouts_completed: int = 0
    rewards_failed: int = 0
    generations_failed: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0


@dataclass(slots=True)
class Counters:
    """Cumulative counters of the run; `state` and `restore` carry them over a restart of the learner."""

    rollouts_acked: int = 0
    rollouts_trained: int = 0
    rollouts_dropped: int = 0
    groups_filtered: int = 0
    tokens_filtered: int = 0
    results_refused: int = 0
    sync_failures: int = 0
    rollouts_failed: dict[str, int] = field(default_factory=dict)
    _beats: dict[str, tuple[int, Beat]] = field(default_factory=dict)  # generator -> (incarnation, newest beat)
    _retired: GeneratorTotals = field(default_factory=GeneratorTotals)
    _last_totals: GeneratorTotals = field(default_factory=GeneratorTotals)
    _last_counts: dict[str, int] = field(default_factory=dict)
    _gap_engine: float | None = None  # of the newest sync that somebody committed

    def beat(self, name: str, incarnation: int, beat: Beat) -> None:
        """Takes in a beat. The first one after a restart of the learner is where counting starts."""
        known = self._beats.get(name)
        if known is None:
            _add(self._last_totals, beat)
        elif known[0] != incarnation:
            _add(self._retired, known[1])
        self._beats[name] = (incarnation, beat)

    def lease_failed(self, reason: str, num_rollouts: int) -> None:
        self.rollouts_failed[reason] = self.rollouts_failed.get(reason, 0) + num_rollouts

    def step_metrics(self, done: StepDone, interval_s: float, buffer: ReplayBuffer, num_alive: int) -> StepMetrics:
        """Everything since the previous step, joined with what the trainer measured in this one."""
        generators = self._generators_since_last()
        parts, figures = _split_off(REWARD_PART, done.metrics)
        by_age, figures = _split_off(AGE_PART, figures)
        return StepMetrics.of_step(
            figures,
            reward_parts=parts,
            age_health=_nested(by_age),
            gap_engine=self._gap_engine,
            gap_drift=_drift(figures.get("logprob_gap"), self._gap_engine),
            version=done.version,
            interval_s=interval_s,
            step_s=done.step_s,
            learner_idle_s=min(done.idle_s, interval_s),
            tokens_generated=generators.tokens_generated,
            generator_busy_s=generators.busy_s,
            generator_idle_s=generators.idle_s,
            rollouts_acked=self._since_last("acked", self.rollouts_acked),
            rollouts_dropped=self._since_last("dropped", self.rollouts_dropped),
            groups_filtered=self._since_last("groups filtered", self.groups_filtered),
            tokens_filtered=self._since_last("tokens filtered", self.tokens_filtered),
            dropped_by_length_decile=[round(count) for count in buffer.dropped_by_length_decile()],
            rollouts_failed={
                reason: self._since_last(f"failed {reason}", count) for reason, count in self.rollouts_failed.items()
            },
            buffer_groups=len(buffer),
            buffer_bytes=buffer.num_bytes,
            generators_alive=num_alive,
        )

    def sync_metrics(self, ended: RoundEnded) -> SyncMetrics:
        """One round of weight sync."""
        committed = ended.committed
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

    def state(self) -> dict[str, object]:
        """Plain values for the checkpoint."""
        return {name: getattr(self, name) for name in _KEPT}

    def restore(self, state: dict[str, object]) -> None:
        """Goes on from `state`; what was counted there was reported already."""
        for name in _KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))  # older checkpoints count less
        self._last_counts = {
            "acked": self.rollouts_acked,
            "dropped": self.rollouts_dropped,
            "groups filtered": self.groups_filtered,
            "tokens filtered": self.tokens_filtered,
        }
        self._last_counts |= {f"failed {reason}": count for reason, count in self.rollouts_failed.items()}

    def _generators_since_last(self) -> GeneratorTotals:
        total, last = GeneratorTotals(), self._last_totals
        _add(total, self._retired)
        for _, beat in self._beats.values():
            _add(total, beat)
        self._last_totals = total
        names = GeneratorTotals.__slots__
        return GeneratorTotals(**{name: getattr(total, name) - getattr(last, name) for name in names})

    def _since_last(self, name: str, count: int) -> int:
        last, self._last_counts[name] = self._last_counts.get(name, 0), count
        return count - last


_KEPT = (
    "rollouts_acked",
    "rollouts_trained",
    "rollouts_dropped",
    "groups_filtered",
    "tokens_filtered",
    "results_refused",
    "sync_failures",
    "rollouts_failed",
)


# What generators time themselves.
_TIMED = ("receive_ms", "decode_ms", "verify_ms", "prepare_ms", "stage_ms", "pause_ms", "canary_ms")


def _split_off(prefix: str, metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The figures whose names begin with `prefix`, without it, and the others."""
    parts = {name: value for name, value in metrics.items() if name.startswith(prefix)}
    others = {name: value for name, value in metrics.items() if name not in parts}
    return {name.removeprefix(prefix): value for name, value in parts.items()}, others


def _nested(by_age: dict[str, float]) -> dict[str, dict[str, float]]:
    """BUCKET/NAME → value as bucket → name → value."""
    nested: dict[str, dict[str, float]] = {}
    for path, value in by_age.items():
        bucket, _, name = path.partition("/")
        nested.setdefault(bucket, {})[name] = value
    return nested


def _apply(committed: Sequence[Committed]) -> str | None:
    """How the engines took the weights: "reload" when one of them did."""
    told = {name for c in committed for name in c.timings_ms}
    return next((kind for kind in ("reload", "direct") if f"{kind}_ms" in told), None)


def _slowest_ms(committed: Sequence[Committed]) -> dict[str, float]:
    """Each time that was reported, in the generator where it was longest."""
    slowest: dict[str, float] = {}
    for one in committed:
        for name, value in one.timings_ms.items():
            slowest[name] = max(value, slowest.get(name, value))
    return slowest


def _gb_per_s(num_bytes: int, ms: float | None) -> float | None:
    return num_bytes / ms / 1e6 if num_bytes and ms else None


def _drift(logprob_gap: float | None, gap_engine: float | None) -> float | None:
    """A lower bound: what engine and policy add to a token's difference may cancel, so the parts exceed the whole."""
    if logprob_gap is None or gap_engine is None:
        return None
    return max(0.0, logprob_gap - gap_engine)


def _add(total: GeneratorTotals, part: GeneratorTotals | Beat) -> None:
    for name in GeneratorTotals.__slots__:
        setattr(total, name, getattr(total, name) + getattr(part, name))

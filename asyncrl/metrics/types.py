"""The typed metrics: one class per event, one field per figure, each with its formula and unit.

Counts and seconds are increments since the previous step, so that totals are sums and survive a restart of
the learner. What was not measured is None; it is never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

# Prefixes in the flat figures of a trainer's StepDone.
REWARD_PART = "reward_part/"  # reward_part/NAME: the mean of one reward part
AGE_PART = "age/"  # age/BUCKET/NAME: a figure over the tokens of one bucket of policy ages


def metric(unit: str, sentence: str, default: Any = MISSING) -> Any:
    """Declares one figure: its unit, and the sentence that says how it is computed."""
    metadata = {"unit": unit, "sentence": sentence}
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step."""

    kind: ClassVar[str] = "step"

    version: int = metric("steps", "Policy version this step made.")
    interval_s: float = metric("s", "Time since the previous step ended (since the trainer was ready for the first).")
    wall_s: float | None = metric("s", "Time the run has taken so far, over all starts of the learner.", None)
    step_s: float | None = metric("s", "Forward, backward and optimizer of this step.", None)

    reward_mean: float = metric("reward", "Mean reward of the rollouts trained on.")
    reward_std: float = metric("reward", "Standard deviation of those rewards over the whole batch.")
    reward_parts: dict[str, float] = metric("reward", "Mean of each part the task reports.", {})
    groups_zero_variance: int = metric("groups", "Groups whose rewards are all equal: their advantages are 0.", 0)
    completion_tokens_mean: float | None = metric("tokens", "Mean length of the completions trained on.", None)
    truncated_share: float | None = metric("share", "Completions that ended at max_new_tokens / completions.", None)

    policy_age_mean: float = metric("steps", "Mean of (version before the step - version of the token) over tokens.")
    policy_age_max: int = metric("steps", "Largest such age in the batch.")

    tokens_generated: int = metric("tokens", "Completion tokens the engines sampled, evaluation included.", 0)
    tokens_trained: int = metric("tokens", "Completion tokens in this batch.", 0)
    rollouts_acked: int = metric("rollouts", "Rollouts made durable and acknowledged.", 0)
    rollouts_trained: int = metric("rollouts", "Rollouts in this batch.", 0)
    rollouts_dropped: int = metric("rollouts", "Acknowledged rollouts thrown away because they were over age.", 0)
    groups_filtered: int = metric(
        "groups", "Groups with equal rewards that were left out and replaced (algorithm.dynamic_sampling).", 0
    )
    tokens_filtered: int = metric("tokens", "Completion tokens of those groups.", 0)
    dropped_by_length_decile: list[int] = metric(
        "rollouts", "All dropped since the learner started, by tenth of all rollouts by length, short first.", []
    )
    rollouts_failed: dict[str, int] = metric(
        "rollouts", "Rollouts of leases that ended without a group, by reason.", {}
    )
    buffer_groups: int | None = metric("groups", "Groups waiting in the replay buffer at the end of the step.", None)
    buffer_bytes: int | None = metric("bytes", "Size of those groups.", None)
    generators_alive: int | None = metric("generators", "Generators whose last beat is within its deadline.", None)

    learner_idle_s: float = metric("s", "Time the trainer waited for a batch, within interval_s.", 0.0)
    generator_busy_s: float = metric("s", "Time with a sequence in the engine, summed over generators.", 0.0)
    generator_idle_s: float = metric("s", "Time without one, summed over generators.", 0.0)

    loss: float | None = metric("nats", "What was minimised, by algorithm.aggregation; mean over the updates.", None)
    policy_loss: float | None = metric("nats", "Its part without KL and entropy.", None)
    kl_reference: float | None = metric(
        "nats", "KL to the reference policy by algorithm.kl_estimator, mean over tokens.", None
    )
    kl_coef: float | None = metric("1", "Weight of that KL in this step, where it adapts itself.", None)
    kl_behaviour: float | None = metric("nats", "Mean of (behaviour - current log-prob) over tokens.", None)
    logprob_gap: float | None = metric("nats", "Mean of |current - behaviour log-prob| over tokens.", None)
    logprob_gap_age0: float | None = metric(
        "nats", "The same over tokens of age 0: what engine and trainer disagree about.", None
    )
    gap_engine: float | None = metric(
        "nats",
        "The part of logprob_gap that equal weights leave: canary_mean_abs_diff of the newest sync.",
        None,
    )
    gap_drift: float | None = metric(
        "nats", "The rest, logprob_gap - gap_engine, never below 0: the policy moved by at least this much.", None
    )
    clip_fraction: float | None = metric("share", "Tokens where the clip removed the gradient / tokens.", None)
    cap_fraction: float | None = metric("share", "Tokens whose weight tis_cap truncated / tokens.", None)
    masked_share: float | None = metric("share", "Tokens that a mask left out of the loss / tokens.", None)
    ratio_mean: float | None = metric("ratio", "Mean of exp(current - behaviour log-prob) over tokens.", None)
    ratio_max: float | None = metric("ratio", "Largest such ratio.", None)
    ess_share: float | None = metric("share", "Effective sample size / N: (sum w)^2 / (N sum w^2), w the ratios.", None)
    age_health: dict[str, dict[str, float]] = metric(
        "mixed",
        "By policy age of the token (0, 1, 2-3, 4-7, ...; ages without tokens are absent): tokens, ratio_mean, "
        "ratio_max, clip_fraction, kl_behaviour, ess_share, masked_share, each as for the whole batch.",
        {},
    )
    entropy: float | None = metric("nats", "Mean entropy of the policy at the trained tokens.", None)
    grad_norm: float | None = metric("norm", "L2 norm of the gradient before clipping.", None)
    lr: float | None = metric("1", "AdamW learning rate of the step.", None)
    value_loss: float | None = metric("reward^2", "Loss of the critic: mean over tokens.", None)
    value_mean: float | None = metric("reward", "Mean value of the critic over tokens, before the step.", None)
    explained_variance: float | None = metric(
        "share",
        "1 - variance of (target - value) / variance of target, over tokens; below 0 is worse than a constant.",
        None,
    )
    value_clip_fraction: float | None = metric("share", "Values that the value clip held back / tokens.", None)
    critic_grad_norm: float | None = metric("norm", "L2 norm of the critic's gradient before clipping.", None)
    publish_blocked_ms: float | None = metric("ms", "Time the trainer waited to hand over its snapshot.", None)
    alarms: list[str] = metric("names", "Alarms that are on after this step; asyncrl.metrics.alarms has the table.", [])
    extra: dict[str, float] = metric("mixed", "Further figures of the trainer, as it names them.", {})

    @classmethod
    def of_step(cls, trainer: Mapping[str, float], **measured: Any) -> StepMetrics:
        """Joins the trainer's figures with what the desk measured; names without a field go to `extra`."""
        known = {entry.name for entry in fields(cls)} - {"extra"}
        mine = {name: _as_declared(name, value) for name, value in trainer.items() if name in known}
        extra = {name: value for name, value in trainer.items() if name not in known}
        return cls(**{**mine, "extra": extra, **measured})

    @property
    def tokens_generated_per_s(self) -> float | None:
        """tokens_generated / interval_s."""
        return _ratio(self.tokens_generated, self.interval_s)

    @property
    def tokens_trained_per_s(self) -> float | None:
        """tokens_trained / interval_s."""
        return _ratio(self.tokens_trained, self.interval_s)

    @property
    def filtered_token_share(self) -> float | None:
        """tokens_filtered / (tokens_filtered + tokens_trained): of what was sampled to train on, what was not."""
        return _ratio(self.tokens_filtered, self.tokens_filtered + self.tokens_trained)

    @property
    def learner_idle_share(self) -> float | None:
        """learner_idle_s / interval_s."""
        return _ratio(self.learner_idle_s, self.interval_s)

    @property
    def generator_idle_share(self) -> float | None:
        """generator_idle_s / (generator_busy_s + generator_idle_s)."""
        return _ratio(self.generator_idle_s, self.generator_busy_s + self.generator_idle_s)

    @property
    def lost_share(self) -> float | None:
        """(failed + dropped) / (failed + acknowledged) rollouts; what a stopping generator returned is not counted."""
        failed = sum(count for reason, count in self.rollouts_failed.items() if reason != "returned")
        return _ratio(failed + self.rollouts_dropped, failed + self.rollouts_acked)


@dataclass(slots=True, kw_only=True)
class SyncMetrics:
    """One round of weight sync: one policy version to the generators of one group.

    Times of generators are those of the slowest one that committed, in its slowest worker.
    """

    kind: ClassVar[str] = "sync"

    version: int = metric("steps", "Policy version that was broadcast.")
    total_ms: float = metric("ms", "From the snapshot being ready to the last commit.")
    generators_committed: int = metric(
        "generators", "Generators that hold the version now, proved by digest and canary."
    )
    generators_failed: int = metric("generators", "Generators left out of this broadcast.", 0)
    members: list[str] = metric("names", "The generators it was offered to.", [])
    retries: int = metric("rounds", "Rounds in a row that had failed before for the most unlucky of its members.", 0)
    catch_up: bool = metric("flag", "A generator that was new or had failed, on a group of its own.", False)
    wall_s: float | None = metric("s", "Time the run has taken so far, over all starts of the learner.", None)

    snapshot_ms: float | None = metric("ms", "Copying the parameters to the staging buffer; the trainer waits.", None)
    encode_ms: float | None = metric("ms", "Comparing this version with the one before, beside the training.", None)
    transfer_ms: float | None = metric(
        "ms", "Sending it, waiting for all members to take part included; training and generation go on.", None
    )
    receive_ms: float | None = metric("ms", "Receiving it, from taking part to the last byte.", None)
    transfer_gb_per_s: float | None = metric("GB/s", "num_bytes / receive_ms, in units of 10**9 bytes.", None)
    decode_ms: float | None = metric("ms", "Making the version of a delta and the one before.", None)
    verify_ms: float | None = metric("ms", "Digests of what was received.", None)
    prepare_ms: float | None = metric(
        "ms", "Work for the swap that is done before it: packing, folding adapters.", None
    )
    stage_ms: float | None = metric("ms", "All of receiving, decoding, verifying and preparing.", None)
    pause_ms: float | None = metric("ms", "No token was sampled: loading what is staged.", None)
    canary_ms: float | None = metric("ms", "Scoring the canary after the swap; generation goes on.", None)

    apply: str | None = metric(
        "name", "How the engines took the weights: direct = copied in place, reload = loaded anew by one or more.", None
    )
    encoding: str | None = metric("name", "What was sent: dense (all of the weights) or delta (what changed).", None)
    num_bytes: int | None = metric("bytes", "Size of what was sent to each generator.", None)
    dense_bytes: int | None = metric("bytes", "Size of all of the weights as they would be sent.", None)
    canary_max_abs_diff: float | None = metric("nats", "Largest |generator - learner| log-prob on the canary.", None)
    canary_mean_abs_diff: float | None = metric(
        "nats", "Mean of |generator - learner| log-prob on the canary, over tokens and generators.", None
    )


@dataclass(slots=True, kw_only=True)
class EvalMetrics:
    """One greedy evaluation on held-out prompts, all tokens from one policy version."""

    kind: ClassVar[str] = "eval"

    version: int = metric("steps", "Policy version that was evaluated.")
    prompts: int = metric("prompts", "Prompts that got a reward.")
    reward_mean: float = metric("reward", "Mean reward of those prompts.")
    reward_parts: dict[str, float] = metric("reward", "Mean of each part the task reports.", {})
    prompts_failed: int = metric("prompts", "Prompts without a reward; not counted as 0.", 0)
    completion_tokens_mean: float | None = metric("tokens", "Mean length of the completions.", None)
    wall_s: float | None = metric("s", "Time the run has taken so far, over all starts of the learner.", None)


AnyMetrics = StepMetrics | SyncMetrics | EvalMetrics

DERIVED = (
    "tokens_generated_per_s",
    "tokens_trained_per_s",
    "learner_idle_share",
    "generator_idle_share",
    "lost_share",
    "filtered_token_share",
)


def youngest_age(bucket: str) -> int:
    """The first policy age of a key of age_health, to sort by: 4 of "4-7", 64 of "64+"."""
    return int(bucket.rstrip("+").split("-")[0])


def _as_declared(name: str, value: float) -> float | int:
    """The trainer reports floats only; counts become integers again."""
    return round(value) if name in _COUNTS and math.isfinite(value) else value


_COUNTS = frozenset(entry.name for entry in fields(StepMetrics) if str(entry.type).startswith("int"))


def to_record(metrics: AnyMetrics) -> dict[str, Any]:
    """A mapping that is valid JSON: kind, every field, and the derived figures of a step.

    JSON has no NaN or infinity: such a figure becomes null and its name goes to `non_finite`.
    """
    record: dict[str, Any] = {"kind": metrics.kind}
    record.update((entry.name, getattr(metrics, entry.name)) for entry in fields(metrics))
    if isinstance(metrics, StepMetrics):
        record.update((name, getattr(metrics, name)) for name in DERIVED)
    non_finite: list[str] = []
    record = {name: _json_ready(name, value, non_finite) for name, value in record.items()}
    if non_finite:
        record["non_finite"] = non_finite
    return record


def _json_ready(name: str, value: Any, non_finite: list[str]) -> Any:
    if isinstance(value, dict):
        return {str(part): _json_ready(f"{name}.{part}", one, non_finite) for part, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(f"{name}.{place}", one, non_finite) for place, one in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)  # numpy scalars included
    if math.isfinite(number):
        return number
    non_finite.append(name)
    return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None

"""The typed metrics: one class per event, one field per figure, each with its unit and the sentence that defines it.

Counts and times are increments since the previous step, so that totals are sums over the lines of metrics.jsonl and
survive a restart of the learner. What was not measured is None, never zero. `asyncrl.metrics.glossary` turns the
declarations into the table of README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from asyncrl.metrics.declaring import LINE, REPORT, SUMMARY, Derived, metric
from asyncrl.metrics.eval_metrics import EvalMetrics as EvalMetrics

# Prefixes in the flat figures of a trainer's StepDone.
REWARD_PART = "reward_part/"  # reward_part/NAME: the mean of one reward part
AGE_PART = "age/"  # age/BUCKET/NAME: a figure over the tokens of one bucket of policy ages

DERIVED = {
    "tokens_generated_per_s": Derived("tokens/s", (LINE, SUMMARY, REPORT)),
    "tokens_trained_per_s": Derived("tokens/s", (LINE, SUMMARY, REPORT)),
    "learner_idle_share": Derived("share", (LINE, SUMMARY, REPORT)),
    "generator_idle_share": Derived("share", (LINE, SUMMARY, REPORT)),
    "lost_share": Derived("share", (REPORT,)),
    "filtered_token_share": Derived("share", (SUMMARY,)),
    "grant_age_mean": Derived("steps", (SUMMARY, REPORT)),
    "grant_age_token_mean": Derived("steps", (SUMMARY, REPORT)),
}


@dataclass(slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step.

    The *behaviour* policy is the one that sampled a token, the *current* policy the one that is trained; a *ratio* is
    exp(current - behaviour log-prob) of a token. The *age* of a token is the version before the step minus the version
    that sampled it. Figures of the loss (from `loss` to `entropy`) are over the tokens that went through the passes:
    all but those of groups that have no gradient.
    """

    kind: ClassVar[str] = "step"

    version: int = metric("steps", "Policy version that this step made.", shown=(LINE, SUMMARY, REPORT))
    interval_s: float = metric(
        "s",
        "Time since the previous step ended, steps that a restart repeats included; for the first step, since the "
        "first generator could work.",
        shown=(SUMMARY, REPORT),
        adds_up=True,
    )
    wall_s: float | None = metric(
        "s", "Time the run has taken so far, over all starts of the learner.", None, shown=(LINE, SUMMARY, REPORT)
    )
    step_s: float | None = metric(
        "s", "Time of this step's forward passes, backward passes and optimizer.", None, shown=(REPORT,), adds_up=True
    )

    reward_mean: float = metric("reward", "Mean reward of the rollouts in this batch.", shown=(LINE, SUMMARY, REPORT))
    reward_std: float = metric(
        "reward", "Standard deviation of the reward over all rollouts in this batch.", shown=(REPORT,)
    )
    reward_parts: dict[str, float] = metric(
        "reward",
        "Mean of each named part of the reward over the rollouts that have it, before its weight.",
        {},
        shown=(REPORT,),
    )
    groups_zero_variance: int = metric(
        "groups",
        "Groups in this batch whose rewards are all equal, so that group-relative advantages are 0.",
        0,
        adds_up=True,
    )
    zero_variance_share: float | None = metric(
        "share",
        "groups_zero_variance / groups in this batch, where algorithm.advantage compares rewards within groups.",
        None,
        shown=(REPORT,),
    )
    completion_tokens_mean: float | None = metric(
        "tokens", "Mean length of the completions in this batch.", None, shown=(REPORT,)
    )
    truncated_share: float | None = metric(
        "share",
        "Completions that were cut off at sampling.max_new_tokens / completions in this batch.",
        None,
        shown=(REPORT,),
    )

    policy_age_mean: float = metric("steps", "Mean age of the tokens in this batch.", shown=(LINE, SUMMARY, REPORT))
    policy_age_max: int = metric("steps", "Largest age of a token in this batch.", shown=(LINE, SUMMARY, REPORT))

    tokens_generated: int = metric(
        "tokens",
        "Completion tokens that the engines sampled, those of evaluations included.",
        0,
        shown=(SUMMARY,),
        adds_up=True,
    )
    tokens_trained: int = metric("tokens", "Completion tokens in this batch.", 0, shown=(SUMMARY,), adds_up=True)
    rollouts_acked: int = metric(
        "rollouts",
        "Rollouts that were written to the journal and acknowledged.",
        0,
        shown=(SUMMARY, REPORT),
        adds_up=True,
    )
    rollouts_trained: int = metric("rollouts", "Rollouts in this batch.", 0, shown=(SUMMARY,), adds_up=True)
    rollouts_dropped: int = metric(
        "rollouts",
        "Acknowledged rollouts that were thrown away because they were over age.",
        0,
        shown=(SUMMARY, REPORT),
        adds_up=True,
    )
    groups_filtered: int = metric(
        "groups",
        "Groups with equal rewards that algorithm.dynamic_sampling left out and replaced.",
        0,
        shown=(SUMMARY, REPORT),
        adds_up=True,
    )
    tokens_filtered: int = metric(
        "tokens",
        "Completion tokens of the groups that algorithm.dynamic_sampling left out.",
        0,
        shown=(SUMMARY,),
        adds_up=True,
    )
    prompts_left_out: int = metric(
        "prompts",
        "Examples that no prompt could be made of: at fault (the log names each) or longer than "
        "model.max_length - sampling.max_new_tokens.",
        0,
        shown=(REPORT,),
        adds_up=True,
    )
    dropped_by_length_decile: list[int] = metric(
        "rollouts",
        "Rollouts dropped since the learner started, in ten classes: the shortest tenth of all rollouts first, the "
        "longest last.",
        [],
        shown=(SUMMARY, REPORT),
    )
    came_in_by_grant_age: dict[str, dict[str, int]] = metric(
        "mixed",
        "Of the rollouts that came in since the step before, filtered ones included, by the version before the step "
        "minus the version that their lease was granted under: rollouts and tokens (of the completions).",
        {},
        shown=(SUMMARY, REPORT),
    )
    trained_by_grant_age: dict[str, dict[str, int]] = metric(
        "mixed", "The same of the rollouts in this batch.", {}, shown=(SUMMARY, REPORT)
    )
    rollouts_failed: dict[str, int] = metric(
        "rollouts",
        "By reason, the rollouts of leases that ended without a group.",
        {},
        shown=(SUMMARY, REPORT),
        adds_up=True,
    )
    buffer_groups: int | None = metric(
        "groups", "Groups that wait in the replay buffer at the end of the step.", None, shown=(REPORT,)
    )
    buffer_bytes: int | None = metric("bytes", "Size of the groups that wait in the replay buffer.", None)
    generators_alive: int | None = metric(
        "generators",
        "Generators whose newest beat is within its deadline at the end of the step.",
        None,
        shown=(REPORT,),
    )

    learner_time_s: dict[str, float] = metric(
        "s", "All of the trainer's time since its last report, by activity.", {}, shown=(SUMMARY, REPORT), adds_up=True
    )
    generator_time_s: dict[str, float] = metric(
        "s", "All of the generators' time, by activity, summed over them.", {}, shown=(SUMMARY, REPORT), adds_up=True
    )
    engine_step_ms: dict[str, float] = metric(
        "ms",
        "What one step of an engine takes, fitted to the steps that it made, mean over generators: fixed, what each "
        "sequence in it adds (sequence), and what the prompt of each new one adds (new_sequence). A quarter of the "
        "steps take less. Empty while engines were too evenly full to tell, and where no generator has beaten since.",
        {},
    )
    overlapped_s: dict[str, float] = metric(
        "s",
        "What was done beside those activities, and ended since the step before: encode and transfer (a version, by "
        "the publisher), stage (it, summed over generators that committed it), checkpoint (its writing, the copy "
        "included).",
        {},
        shown=(SUMMARY,),
        adds_up=True,
    )
    learner_idle_s: float = metric(
        "s", "Time within interval_s in which the trainer waited for a batch.", 0.0, shown=(SUMMARY,), adds_up=True
    )
    generator_busy_s: float = metric(
        "s",
        "Time with at least one sequence in the engine, summed over generators: swap, decode and eval.",
        0.0,
        shown=(SUMMARY,),
        adds_up=True,
    )
    generator_idle_s: float = metric(
        "s", "The rest of their time since their engines were up.", 0.0, shown=(SUMMARY,), adds_up=True
    )

    learner_cpu_s: float | None = metric(
        "s", "CPU time of the learner's processes on the host of the desk.", None, adds_up=True
    )
    generator_cpu_s: float = metric("s", "CPU time of the generators' processes, summed over them.", 0.0, adds_up=True)

    loss: float | None = metric(
        "nats",
        "What the optimizer minimised: the loss over the batch by algorithm.aggregation, mean over the step's updates.",
        None,
    )
    policy_loss: float | None = metric("nats", "The part of `loss` that is neither KL nor entropy.", None)
    kl_reference: float | None = metric(
        "nats",
        "Mean over tokens of the KL to the reference policy, estimated by algorithm.kl_estimator.",
        None,
        shown=(REPORT,),
    )
    kl_coef: float | None = metric(
        "1",
        "Weight of the KL to the reference policy in this step; measured where algorithm.kl_target adapts it.",
        None,
    )
    kl_behaviour: float | None = metric(
        "nats",
        "Mean over tokens of behaviour - current log-prob: estimates the KL from the behaviour to the current policy.",
        None,
        shown=(REPORT,),
    )
    logprob_gap: float | None = metric("nats", "Mean over tokens of |current - behaviour log-prob|.", None)
    logprob_gap_age0: float | None = metric(
        "nats", "logprob_gap over the tokens of age 0 alone: what generator and trainer disagree about.", None
    )
    gap_engine: float | None = metric(
        "nats",
        "The part of logprob_gap that is there with one version at both ends, rounding on the wire included: "
        "canary_mean_abs_diff of the newest sync.",
        None,
        shown=(SUMMARY, REPORT),
    )
    gap_drift: float | None = metric(
        "nats",
        "The rest of logprob_gap, logprob_gap - gap_engine and at least 0: the policy moved by no less than this.",
        None,
        shown=(SUMMARY, REPORT),
    )
    clip_fraction: float | None = metric(
        "share", "Tokens whose gradient the clip of the loss removed / tokens.", None, shown=(REPORT,)
    )
    cap_fraction: float | None = metric(
        "share", "Tokens whose importance weight algorithm.tis_cap truncated / tokens.", None
    )
    masked_share: float | None = metric(
        "share", "Tokens that algorithm.masks left out of the loss / tokens.", None, shown=(REPORT,)
    )
    ratio_mean: float | None = metric("ratio", "Mean ratio over tokens; 1 when nothing moved.", None)
    ratio_max: float | None = metric("ratio", "Largest ratio of a token.", None, shown=(REPORT,))
    ess_share: float | None = metric(
        "share",
        "Effective sample size / N of the ratios w: (sum w)^2 / (N sum w^2); 1 when all are equal.",
        None,
        shown=(SUMMARY, REPORT),
    )
    age_health: dict[str, dict[str, float]] = metric(
        "mixed",
        "By the age of the token (0, 1, 2-3, 4-7, ... 64+; ages without tokens are absent): tokens, ratio_mean, "
        "ratio_max, clip_fraction, kl_behaviour, ess_share and masked_share, each as for the whole batch.",
        {},
        shown=(SUMMARY, REPORT),
    )
    entropy: float | None = metric(
        "nats", "Mean entropy of the current policy at the tokens of this batch.", None, shown=(REPORT,)
    )
    grad_norm: float | None = metric("norm", "L2 norm of the gradient before learner.grad_clip.", None, shown=(REPORT,))
    lr: float | None = metric("1", "AdamW learning rate of this step, its warm-up included.", None)
    value_loss: float | None = metric(
        "reward^2", "Half the mean squared difference between the critic's values and their targets.", None
    )
    value_mean: float | None = metric("reward", "Mean value that the critic gives the tokens of this batch.", None)
    explained_variance: float | None = metric(
        "share",
        "1 - variance of (target - value) / variance of target, over tokens; below 0 the critic predicts worse than a "
        "constant.",
        None,
        shown=(REPORT,),
    )
    value_clip_fraction: float | None = metric(
        "share", "Tokens whose gradient critic.value_clip removed / tokens.", None
    )
    critic_grad_norm: float | None = metric("norm", "L2 norm of the critic's gradient before clipping.", None)
    publish_blocked_ms: float | None = metric(
        "ms",
        "Time for which training stood still for a version to go out: the canary's forward pass and the snapshot.",
        None,
    )
    alarms: list[str] = metric(
        "names", "Alarms that are on after this step, by the figure they watch.", [], shown=(LINE, SUMMARY, REPORT)
    )
    extra: dict[str, float] = metric(
        "mixed",
        "What else the trainer counted in this step: groups_trained, micro_batches, model_inputs (tokens that a "
        "forward pass over those computes), tokens_without_gradient (tokens of groups that have no gradient); and of "
        "the passes that made gradients on rank 0 how many (passes), their inputs, the squares of these, their "
        "seconds, and the sum of inputs x seconds: a pass is taken to be a + b x inputs.",
        {},
    )

    @classmethod
    def of_step(cls, trainer: Mapping[str, float], **measured: Any) -> StepMetrics:
        """Joins the trainer's figures with what the desk measured; names without a field go to `extra`."""
        known = {entry.name for entry in fields(cls)} - {"extra"}
        declared = {name: _as_declared(name, value) for name, value in trainer.items() if name in known}
        extra = {name: value for name, value in trainer.items() if name not in known}
        return cls(**{**declared, "extra": extra, **measured})

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
        """tokens_filtered / (tokens_filtered + tokens_trained): what dynamic sampling left out of all it sampled."""
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
    def grant_age_mean(self) -> float | None:
        """Mean, over the rollouts in this batch, of the version before the step minus that of the lease's grant."""
        return _mean_age(self.trained_by_grant_age, "rollouts")

    @property
    def grant_age_token_mean(self) -> float | None:
        """The same over their tokens: above grant_age_mean where long completions are trained later than short ones."""
        return _mean_age(self.trained_by_grant_age, "tokens")

    @property
    def lost_share(self) -> float | None:
        """Rollouts (failed + dropped) / (failed + acknowledged); what a stopping generator returned has not failed."""
        failed = sum(count for reason, count in self.rollouts_failed.items() if reason != "returned")
        return _ratio(failed + self.rollouts_dropped, failed + self.rollouts_acked)


@dataclass(slots=True, kw_only=True)
class SyncMetrics:
    """One round of weight sync: one policy version sent to the generators of one cell.

    A time that generators measure is that of the slowest worker of the slowest generator that committed.
    """

    kind: ClassVar[str] = "sync"

    version: int = metric("steps", "Policy version that was broadcast.")
    total_ms: float = metric(
        "ms", "Time from the moment the snapshot was ready to the last commit.", shown=(LINE, SUMMARY, REPORT)
    )
    generators_committed: int = metric(
        "generators",
        "Generators that hold the version now, which digests and canary proved.",
        shown=(SUMMARY, REPORT),
    )
    generators_failed: int = metric(
        "generators", "Generators that the round had to leave out.", 0, shown=(REPORT,), adds_up=True
    )
    members: list[str] = metric("names", "Generators that were offered the version.", [], shown=(REPORT,))
    retries: int = metric(
        "rounds",
        "Failed rounds in a row before this one, counted for the member that has most of them.",
        0,
        shown=(SUMMARY,),
    )
    catch_up: bool = metric(
        "flag", "True when the round was for one generator alone, which was new or had failed.", False, shown=(REPORT,)
    )
    wall_s: float | None = metric(
        "s", "Time the run has taken so far, over all starts of the learner.", None, shown=(SUMMARY, REPORT)
    )

    snapshot_ms: float | None = metric(
        "ms",
        "Copying the parameters to the staging buffer, for which the trainer stands still.",
        None,
        shown=(SUMMARY, REPORT),
    )
    encode_ms: float | None = metric(
        "ms", "Comparing this version with the one before it, while training goes on.", None
    )
    transfer_ms: float | None = metric(
        "ms",
        "Sending the version, the wait for all members to take part included; training and generation go on.",
        None,
        shown=(REPORT,),
    )
    receive_ms: float | None = metric("ms", "Receiving the version, from taking part to the last byte.", None)
    transfer_gb_per_s: float | None = metric(
        "GB/s", "num_bytes / receive_ms, in units of 10**9 bytes per second.", None, shown=(SUMMARY,)
    )
    decode_ms: float | None = metric("ms", "Making the version out of a delta and the version before it.", None)
    verify_ms: float | None = metric("ms", "Checking the digests of what was received.", None, shown=(SUMMARY,))
    prepare_ms: float | None = metric(
        "ms", "Work for the swap that is done before it, such as packing matrices and folding adapters.", None
    )
    stage_ms: float | None = metric("ms", "All of receiving, decoding, verifying and preparing.", None)
    pause_ms: float | None = metric(
        "ms", "Swapping in what is staged, during which no token is sampled.", None, shown=(SUMMARY, REPORT)
    )
    canary_ms: float | None = metric(
        "ms", "Scoring the canary after the swap, while generation goes on.", None, shown=(SUMMARY, REPORT)
    )

    apply: str | None = metric(
        "name",
        "How the engines took the weights: direct (all copied them in place), or reload (some loaded them anew).",
        None,
    )
    encoding: str | None = metric("name", "What was sent: dense (all of the weights) or delta (what changed).", None)
    num_bytes: int | None = metric("bytes", "Size of what was sent to each generator.", None, adds_up=True)
    dense_bytes: int | None = metric("bytes", "Size that all of the weights would have had.", None, adds_up=True)
    canary_max_abs_diff: float | None = metric(
        "nats", "Largest |generator - learner log-prob| of a token of the canary.", None, shown=(SUMMARY,)
    )
    canary_mean_abs_diff: float | None = metric(
        "nats",
        "Mean |generator - learner log-prob| over the tokens of the canary and over generators.",
        None,
        shown=(SUMMARY,),
    )


AnyMetrics = StepMetrics | SyncMetrics | EvalMetrics


def youngest_age(bucket: str) -> int:
    """The first policy age of a key of age_health, to sort by: 4 of "4-7", 64 of "64+"."""
    return int(bucket.rstrip("+").split("-")[0])


def _as_declared(name: str, value: float) -> float | int:
    """The trainer reports floats only; counts become integers again."""
    return round(value) if name in _COUNTS and math.isfinite(value) else value


_COUNTS = frozenset(entry.name for entry in fields(StepMetrics) if str(entry.type).startswith("int"))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _mean_age(by_age: Mapping[str, Mapping[str, int]], weight: str) -> float | None:
    whole = sum(counts[weight] for counts in by_age.values())
    return _ratio(sum(int(age) * counts[weight] for age, counts in by_age.items()), whole)

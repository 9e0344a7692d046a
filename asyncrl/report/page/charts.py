"""Which charts a report has, in the order in which somebody looks who wants to know why a run misbehaves.

A chart is declared by what its lines read of a record. One whose lines were never measured is left out. With several
runs beside each other, only the lines that are `compared` are drawn, in one color for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from asyncrl.report.lengths import Lengths
from asyncrl.report.page.chart import COLORS, Style
from asyncrl.report.run_records import EvalRecord, StepRecord, SyncRecord

Record = TypeVar("Record", StepRecord, EvalRecord, SyncRecord)


@dataclass(frozen=True)  # a generic class with slots cannot be frozen in Python 3.11
class ChartLine(Generic[Record]):
    """One line of a chart. noisy: its running mean is drawn, and the figures faintly behind it."""

    label: str
    figure: Callable[[Record], float | None]
    noisy: bool = False
    compared: bool = False
    style: Style = "line"
    color: str = ""  # by its place among the lines where empty


StepLine = ChartLine[StepRecord]
EvalLine = ChartLine[EvalRecord]
SyncLine = ChartLine[SyncRecord]


@dataclass(frozen=True, slots=True)
class JoinedLine:
    """A line that is worked out from all steps together: of each step its figure."""

    label: str
    figures: Callable[[Sequence[StepRecord]], Sequence[float | None]]
    color: str


@dataclass(frozen=True, slots=True)
class ChartPlan:
    """A chart before there is a run.

    joined   lines over steps that are worked out from all of them together
    evals    lines over evaluations
    rounds   lines over versions: of each, its slowest round of weight sync
    by_age   a figure of `age_health`: one line for each bucket of ages
    parts    one line for each name in a mapping; with `stacked`, each name's share of their sum
    eval_parts    the same of evaluations
    alarms   whose limits and times it shows, by the figures they watch
    """

    key: str
    title: str
    note: str
    lines: tuple[StepLine, ...] = ()
    joined: tuple[JoinedLine, ...] = ()
    evals: tuple[EvalLine, ...] = ()
    rounds: tuple[SyncLine, ...] = ()
    by_age: str = ""
    parts: Callable[[StepRecord], Mapping[str, float | None]] | None = None
    eval_parts: Callable[[EvalRecord], Mapping[str, float | None]] | None = None
    alarms: tuple[str, ...] = ()
    unit: str = ""
    percent: bool = False
    log: bool = False
    stacked: bool = False
    edges: tuple[float, ...] = ()


def trained_length(step: StepRecord) -> float | None:
    """The mean length of what was trained in a step that knows when that was granted."""
    return step.completion_tokens_mean if step.trained_by_grant_age else None


def as_granted(steps: Sequence[StepRecord], *, trained: bool) -> list[float | None]:
    """Of each step the mean length of what was granted under the version before it; or of what was trained of that."""
    lengths = Lengths.of(steps, steps)
    means = lengths.trained if trained else lengths.came_in
    return [means.get(step.version - 1) for step in steps]


LEARNING = (
    ChartPlan(
        "reward",
        "Reward",
        "mean of each batch, and of held-out prompts",
        (StepLine("training", lambda step: step.reward_mean, noisy=True, compared=True),),
        evals=(
            EvalLine("held-out", lambda result: result.reward_mean, compared=True, style="dots"),
            EvalLine(
                "held-out, best of each prompt", lambda result: result.reward_best_mean, style="dots", color=COLORS[2]
            ),
        ),
    ),
    ChartPlan(
        "reward_std",
        "Spread of rewards",
        "standard deviation over a batch; at 0 there is nothing to learn",
        (StepLine("all rollouts", lambda step: step.reward_std, noisy=True, compared=True),),
        alarms=("reward_std",),
        edges=(0.0,),
    ),
    ChartPlan("parts", "Parts of the reward", "mean of each, before its weight", parts=lambda step: step.reward_parts),
    ChartPlan(
        "eval_parts",
        "Parts of the reward in evaluations",
        "mean over completions; best: mean over prompts of the best completion",
        eval_parts=lambda result: {
            **result.reward_parts,
            **{f"{name}, best": value for name, value in result.reward_parts_best.items()},
        },
    ),
    ChartPlan(
        "no_signal",
        "Groups without a signal",
        "all of their rewards are equal",
        (StepLine("of all groups", lambda step: step.zero_variance_share, noisy=True, compared=True),),
        alarms=("zero_variance_share",),
        percent=True,
        edges=(0.0,),
    ),
    ChartPlan(
        "entropy",
        "Entropy",
        "of the current policy, mean over tokens",
        (StepLine("entropy", lambda step: step.entropy, noisy=True, compared=True),),
        alarms=("entropy",),
        unit="nats",
        edges=(0.0,),
    ),
    ChartPlan(
        "grad_norm",
        "Gradient norm",
        "before learner.grad_clip",
        (StepLine("all parameters", lambda step: step.grad_norm, noisy=True, compared=True),),
        log=True,
    ),
    ChartPlan(
        "kl_reference",
        "KL to the reference",
        "mean over tokens",
        (StepLine("KL", lambda step: step.kl_reference, noisy=True, compared=True),),
        alarms=("kl_reference",),
        unit="nats",
        edges=(0.0,),
    ),
    ChartPlan(
        "critic",
        "What the critic explains",
        "of the variance of its targets; below 0 it is worse than a constant",
        (StepLine("explained", lambda step: step.explained_variance, noisy=True, compared=True),),
        alarms=("explained_variance",),
        percent=True,
        edges=(0.0,),
    ),
)

OFF_POLICY = (
    ChartPlan(
        "age",
        "Policy age",
        "steps between sampling a token and training on it",
        (
            StepLine("largest", lambda step: step.policy_age_max, color=COLORS[7]),
            StepLine("mean", lambda step: step.policy_age_mean, compared=True, color=COLORS[0]),
        ),
        unit="steps",
        edges=(0.0,),
    ),
    ChartPlan(
        "ess",
        "Effective sample size",
        "share of the tokens that carry the gradient, by age",
        (StepLine("all ages", lambda step: step.ess_share, noisy=True, compared=True),),
        by_age="ess_share",
        alarms=("ess_share",),
        percent=True,
        edges=(0.0, 1.0),
    ),
    ChartPlan(
        "clip",
        "Clipped and masked tokens",
        "share of the tokens whose gradient was removed, by age",
        (
            StepLine("all ages", lambda step: step.clip_fraction, noisy=True, compared=True),
            StepLine("masked, all ages", lambda step: step.masked_share, style="dotted", color=COLORS[5]),
        ),
        by_age="clip_fraction",
        alarms=("clip_fraction", "masked_share"),
        percent=True,
        edges=(0.0,),
    ),
    ChartPlan(
        "ratio",
        "Largest ratio",
        "of a token: current policy to the one that sampled it, by age",
        (StepLine("all ages", lambda step: step.ratio_max, noisy=True, compared=True),),
        by_age="ratio_max",
        log=True,
    ),
    ChartPlan(
        "kl",
        "KL from behaviour to current policy",
        "estimate over tokens, by age",
        (StepLine("all ages", lambda step: step.kl_behaviour, noisy=True, compared=True),),
        by_age="kl_behaviour",
        alarms=("kl_behaviour",),
        unit="nats",
        edges=(0.0,),
    ),
    ChartPlan(
        "gap",
        "Log-prob gap",
        "drift: a lower staleness.max_age helps; engine: generator and learner compute differently",
        (
            StepLine("policy drift", lambda step: step.gap_drift, noisy=True, compared=True),
            StepLine("engine mismatch", lambda step: step.gap_engine, noisy=True, compared=True),
        ),
        alarms=("gap_engine",),
        unit="nats",
        log=True,
    ),
)

SPEED = (
    ChartPlan(
        "throughput",
        "Throughput",
        "tokens per second, generated and trained",
        (
            StepLine("generated", lambda step: step.tokens_generated_per_s, noisy=True, compared=True, color=COLORS[1]),
            StepLine("trained", lambda step: step.tokens_trained_per_s, noisy=True, compared=True, color=COLORS[0]),
        ),
        unit="tokens/s",
        edges=(0.0,),
    ),
    ChartPlan(
        "idle",
        "Idle time",
        "whoever idles less is the bottleneck",
        (
            StepLine("generators", lambda step: step.generator_idle_share, noisy=True, compared=True, color=COLORS[1]),
            StepLine("learner", lambda step: step.learner_idle_share, noisy=True, compared=True, color=COLORS[0]),
        ),
        percent=True,
        edges=(0.0, 1.0),
    ),
    ChartPlan(
        "learner_time",
        "Time of the learner",
        "what it did, as shares; data: it waited for a batch",
        parts=lambda step: step.learner_time_s,
        stacked=True,
        percent=True,
    ),
    ChartPlan(
        "generator_time",
        "Time of the generators",
        "what they did, as shares; leases: they waited for work",
        parts=lambda step: step.generator_time_s,
        stacked=True,
        percent=True,
    ),
    ChartPlan(
        "step_time",
        "Time of a step",
        "from one step to the next, and of it passes and optimizer",
        (
            StepLine("interval", lambda step: step.interval_s, noisy=True, compared=True),
            StepLine("computing", lambda step: step.step_s, noisy=True),
        ),
        unit="s",
        edges=(0.0,),
    ),
    ChartPlan(
        "buffer",
        "Replay buffer",
        "groups that wait at the end of a step",
        (StepLine("waiting", lambda step: step.buffer_groups, compared=True),),
        unit="groups",
        edges=(0.0,),
    ),
)

COMPLETIONS = (
    ChartPlan(
        "length",
        "Length of completions",
        "mean tokens of those trained, and of evaluations",
        (StepLine("training", lambda step: step.completion_tokens_mean, noisy=True, compared=True),),
        evals=(EvalLine("held-out", lambda result: result.completion_tokens_mean, style="dots"),),
        unit="tokens",
        edges=(0.0,),
    ),
    ChartPlan(
        "granted",
        "Lengths as granted and as trained",
        "mean tokens; trained below granted: short completions come first, or long ones are filtered or lost",
        (StepLine("trained in this step", trained_length, noisy=True, color=COLORS[0]),),
        joined=(
            JoinedLine("granted at this step", lambda steps: as_granted(steps, trained=False), COLORS[1]),
            JoinedLine("granted at this step and trained", lambda steps: as_granted(steps, trained=True), COLORS[2]),
        ),
        unit="tokens",
        edges=(0.0,),
    ),
    ChartPlan(
        "grant_age",
        "From grant to training",
        "steps; tokens above completions: short completions are trained earlier than long ones",
        (
            StepLine("mean over completions", lambda step: step.grant_age_mean, noisy=True, compared=True),
            StepLine("mean over tokens", lambda step: step.grant_age_token_mean, noisy=True, compared=True),
        ),
        unit="steps",
        edges=(0.0,),
    ),
    ChartPlan(
        "truncated",
        "Cut-off completions",
        "they ended at sampling.max_new_tokens",
        (StepLine("of those trained", lambda step: step.truncated_share, noisy=True, compared=True),),
        alarms=("truncated_share",),
        percent=True,
        edges=(0.0,),
    ),
    ChartPlan(
        "lost",
        "Lost rollouts",
        "failed, or over age; long ones go first",
        (StepLine("of all rollouts", lambda step: step.lost_share, noisy=True, compared=True),),
        alarms=("lost_share",),
        percent=True,
        edges=(0.0,),
    ),
)

SYNC = (
    ChartPlan(
        "sync_time",
        "Time of a weight sync",
        "of each version, its slowest round",
        rounds=(
            SyncLine("snapshot ready to last commit", lambda sync: sync.total_ms, compared=True),
            SyncLine("sending", lambda sync: sync.transfer_ms),
            SyncLine("scoring the canary", lambda sync: sync.canary_ms),
            SyncLine("generation paused", lambda sync: sync.pause_ms, compared=True, color=COLORS[4]),
            SyncLine("training paused", lambda sync: sync.snapshot_ms, color=COLORS[5]),
        ),
        unit="ms",
        log=True,
    ),
    ChartPlan(
        "generators",
        "Generators alive",
        "with a beat in time, at the end of a step",
        (StepLine("alive", lambda step: step.generators_alive, compared=True),),
        edges=(0.0,),
    ),
)

SECTIONS = (
    ("learning", "Learning", LEARNING),
    ("off-policy", "Off-policy health", OFF_POLICY),
    ("speed", "Speed", SPEED),
    ("completions", "Completions", COMPLETIONS),
    ("sync", "Weight sync", SYNC),
)
CHART_OF_ALARM = {alarm: plan.key for _, _, plans in SECTIONS for plan in plans for alarm in plan.alarms}

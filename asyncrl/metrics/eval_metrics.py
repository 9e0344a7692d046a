"""What an evaluation measures; declared like the metrics of `metrics.types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from asyncrl.metrics.declaring import LINE, REPORT, SUMMARY, metric


@dataclass(slots=True, kw_only=True)
class EvalMetrics:
    """One evaluation on held-out prompts, all tokens from one policy version."""

    kind: ClassVar[str] = "eval"

    version: int = metric("steps", "Policy version that was evaluated.", shown=(LINE,))
    prompts: int = metric("prompts", "Held-out prompts that got a reward.", shown=(LINE,))
    samples: int = metric("completions", "Completions of each of those prompts.", 1, shown=(LINE, SUMMARY))
    temperature: float = metric("1", "Softmax temperature of these; 0 = greedy.", 0.0, shown=(LINE,))
    reward_mean: float = metric("reward", "Mean reward of those completions.", shown=(LINE, SUMMARY, REPORT))
    reward_parts: dict[str, float] = metric(
        "reward",
        "Mean of each named part of the reward over the completions that have it, before its weight.",
        {},
        shown=(LINE, SUMMARY, REPORT),
    )
    reward_best_mean: float | None = metric(
        "reward",
        "Mean, over those prompts, of the best reward of each; nothing where each has one completion.",
        None,
        shown=(SUMMARY, REPORT),
    )
    reward_parts_best: dict[str, float] = metric(
        "reward",
        "Mean, over the prompts that have a part, of its best value: pass@k of a part that is 0 or 1. Nothing where "
        "each prompt has one completion.",
        {},
        shown=(LINE, SUMMARY, REPORT),
    )
    prompts_failed: int = metric(
        "prompts", "Held-out prompts without a reward; they do not count as 0.", 0, shown=(LINE,)
    )
    completion_tokens_mean: float | None = metric("tokens", "Mean length of the completions.", None, shown=(REPORT,))
    wall_s: float | None = metric(
        "s", "Time the run has taken so far, over all starts of the learner.", None, shown=(LINE, SUMMARY, REPORT)
    )

"""Training at a forced policy age, in one process: step v is sampled by the policy of version v - age.

The rollouts are real (tokens sampled by the old weights, their log-probs as sampled, rewards of the task, version spans
that say which policy it was) and go through the very `StepRunner` of the trainer. What is left out is what makes age
random: engine, link and clocks. While the learner is younger than `age`, version 0 samples.

Run as a program it is a worker: a job per line comes in on stdin, a result per line goes out on stdout.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.config.loading import load_config
from asyncrl.errors import NonFiniteError
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.tasks.base import Task, checked_reward, load_task
from asyncrl.tasks.prompts import Prompt, PromptSource
from asyncrl.trainer.critic import load_critic
from asyncrl.trainer.engines.policy import Policy, load_policy
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.packing import pack_groups
from asyncrl.trainer.step import StepRunner
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE, FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan
from benchmarks import common
from benchmarks.studies import shared

Weights = dict[str, Tensor]
FRESH_ORDINAL = 10**9  # prompts for measurements: a seeded shuffle far behind what any run trains on
FRESH_GROUPS = 32
CURVE_POINTS = 40  # of each curve in the result, at most: means of as many stretches of the run
LAST_EVALS = 3  # whose mean is the final accuracy
CURVES = ("reward_mean", "ess_share", "entropy", "kl_behaviour", "explained_variance")
FIGURES = CURVES + ("clip_fraction", "cap_fraction", "masked_share", "ratio_mean", "ratio_max", "logprob_gap")
FIGURES += ("logprob_gap_age0", "policy_age_mean", "groups_zero_variance", "grad_norm", "value_loss", "value_mean")


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens as sampled, the end token included, and their log-probs under the policy that sampled them."""

    token_ids: list[int]
    logprobs: list[float]
    ended: bool


class Sampler:
    """Batched sampling with a KV cache, from weights that are exchanged at will."""

    def __init__(self, model_path: str, end_id: int, max_new_tokens: int) -> None:
        self._model = Policy.load(model_path).freeze().model
        self._end_id = end_id
        self._max_new_tokens = max_new_tokens

    def load(self, weights: Weights) -> None:
        """Samples from these weights from now on."""
        self._model.load_state_dict(weights)

    def complete(
        self, prompts: Sequence[np.ndarray], copies: int, temperature: float, generator: torch.Generator | None = None
    ) -> list[list[Completion]]:
        """`copies` completions of each prompt; temperature 0 is greedy, and has log-probs at temperature 1."""
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        completions: list[list[Completion]] = [[] for _ in prompts]
        for indices in by_length.values():
            tokens = torch.from_numpy(np.stack([prompts[index] for index in indices])).long()
            drawn = self._complete_equal_lengths(tokens, copies, temperature, generator)
            for place, index in enumerate(indices):
                completions[index] = drawn[place * copies : (place + 1) * copies]
        return completions

    @torch.inference_mode()
    def _complete_equal_lengths(
        self, prompts: Tensor, copies: int, temperature: float, generator: torch.Generator | None
    ) -> list[Completion]:
        # The cache of a prompt is computed once and repeated.
        outputs = self._model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(copies)
        logits = outputs.logits[:, -1].repeat_interleave(copies, dim=0)
        rows = torch.arange(len(logits))  # the completions that have not ended
        tokens = torch.full((len(rows), self._max_new_tokens), self._end_id)
        logprobs = torch.zeros(len(rows), self._max_new_tokens)
        lengths = torch.full((len(rows),), self._max_new_tokens)
        for place in range(self._max_new_tokens):
            distribution = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            if temperature:
                chosen = torch.multinomial(distribution.exp(), 1, generator=generator)
            else:
                chosen = logits.argmax(dim=-1, keepdim=True)
            tokens[rows, place] = chosen[:, 0]
            logprobs[rows, place] = distribution.gather(1, chosen)[:, 0]
            goes_on = chosen[:, 0] != self._end_id
            lengths[rows[~goes_on]] = place + 1
            if place + 1 == self._max_new_tokens or not bool(goes_on.any()):
                break
            if not bool(goes_on.all()):
                rows, chosen = rows[goes_on], chosen[goes_on]
                cache.batch_select_indices(goes_on.nonzero()[:, 0])
            logits = self._model(input_ids=chosen, past_key_values=cache, use_cache=True).logits[:, -1]
        return [
            Completion(ids[:length], values[:length], ids[length - 1] == self._end_id)
            for ids, values, length in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        ]


class DelayedTraining:
    """One training run whose rollouts are `age` versions old."""

    def __init__(self, config: Config, age: int, eval_prompts: int) -> None:
        self.config = config
        self.age = age
        torch.manual_seed(config.run.seed)
        self.policy = load_policy(config.model, torch.device("cpu"), update=config.update, seed=config.run.seed)
        reference = self.policy.initial_policy() if config.algorithm.kl_coef > 0 else None
        self.critic = load_critic(config, self.policy)
        engines = engines_for(self.policy, config, reference=reference, critic=self.critic)
        self.trainer = StepRunner(engines, config)
        self.task: Task = load_task(config.task.path, config.task.args)
        self.tokenizer = load_tokenizer(config.model.path)
        sampling = config.sampling
        self.sampler = Sampler(config.model.path, self.tokenizer.eos_token_id, sampling.max_new_tokens)
        longest = config.model.max_length - sampling.max_new_tokens
        self.prompts = PromptSource(self.task, self.tokenizer, config.run.seed, longest)
        self.held_out = self.prompts.evals(eval_prompts)
        self.versions: deque[tuple[int, Weights]] = deque(maxlen=age + 1)
        self._keep()

    def step(self) -> dict[str, float]:
        """Samples a batch from the oldest version kept, and trains on it; returns the step's metrics."""
        result = self.trainer.step(self.sample_batch())
        self._keep()
        return result.metrics

    def sample_batch(self) -> list[Group]:
        """The groups of the next step. Equal seeds give equal prompts and draws, whatever the method."""
        step, count = self.trainer.version, self.config.learner.groups_per_step
        return self._sample(*self.versions[0], range(step * count, (step + 1) * count), step)

    def fresh_batch(self, num_groups: int) -> list[Group]:
        """Groups that the newest policy samples, of prompts that training does not reach; nothing is trained."""
        return self._sample(*self.versions[-1], range(FRESH_ORDINAL, FRESH_ORDINAL + num_groups), FRESH_ORDINAL)

    def _sample(self, version: int, weights: Weights, ordinals: range, draw: int) -> list[Group]:
        prompts = [self.prompts.train(ordinal) for ordinal in ordinals]
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + draw)
        sampling = self.config.sampling
        self.sampler.load(weights)
        drawn = self.sampler.complete(
            [prompt.token_ids for prompt in prompts], sampling.group_size, sampling.temperature, generator
        )
        return [
            Group(
                LeaseKey(LeaseKind.TRAIN, ordinal, 0),
                prompt.token_ids,
                [self._rollout(prompt, completion, version) for completion in completions],
            )
            for ordinal, prompt, completions in zip(ordinals, prompts, drawn, strict=True)
        ]

    def accuracy(self) -> float:
        """Mean reward of greedy completions of the held-out prompts, under the newest weights."""
        self.sampler.load(self.versions[-1][1])
        drawn = self.sampler.complete([prompt.token_ids for prompt in self.held_out], 1, 0.0)
        rewards = [
            sum(self._reward(prompt, completion).values())
            for prompt, (completion,) in zip(self.held_out, drawn, strict=True)
        ]
        return float(np.mean(rewards))

    def fresh_explained_variance(self, num_groups: int) -> float | None:
        """How well the critic knows the present policy: 1 - Var[return - value] / Var[return] over the tokens of
        completions sampled just now, whose returns are their rewards. None without critic, or if all returns are equal.

        The trainer's own figure is measured against the targets it trains on, which differ from method to method.
        """
        critic, policy = self.critic, self.policy
        if critic is None:
            return None
        groups = self.fresh_batch(num_groups)
        rewards = np.array([rollout.reward for group in groups for rollout in group.rollouts])
        values, returns = [], []
        with torch.no_grad():
            for batch in pack_groups(groups, self.trainer.version, self.config.learner.micro_batch_tokens):
                hidden = policy.hidden(batch.rows) if critic.is_shared else None
                values.append(critic.values(batch.rows, hidden).numpy())
                returns.append(rewards[batch.rollout_index][batch.sequence_index])
        errors, variance = np.concatenate(returns) - np.concatenate(values), np.concatenate(returns).var()
        return float(1.0 - errors.var() / variance) if variance > 0 else None

    def _rollout(self, prompt: Prompt, completion: Completion, version: int) -> Rollout:
        parts = self._reward(prompt, completion)
        return Rollout(
            np.array(completion.token_ids, dtype=TOKEN_DTYPE),
            np.array(completion.logprobs, dtype=LOGPROB_DTYPE),
            (VersionSpan(0, len(completion.token_ids), version),),
            FinishReason.STOP if completion.ended else FinishReason.LENGTH,
            sum(parts.values()),
            parts,
        )

    def _reward(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return checked_reward(self.task, text, prompt.payload)

    def _keep(self) -> None:
        weights = {name: value.clone() for name, value in self.policy.model.state_dict().items()}
        self.versions.append((self.trainer.version, weights))


def run_job(job: shared.Job) -> dict[str, Any]:
    """One run. job: overrides (of the configuration), age, seed, steps, eval_every, eval_prompts.

    A gradient that is not finite ends the run where it stands: `diverged_at` is that version, and the curves and
    evaluations go up to it.
    """
    started = time.perf_counter()
    overrides = [*job["overrides"], f"run.seed={job['seed']}", f"run.steps={job['steps']}"]
    overrides += [f"staleness.max_age={job['age']}", "staleness.over_age=train", "learner.device=cpu"]
    training = DelayedTraining(load_config(None, overrides), job["age"], job["eval_prompts"])
    metrics: list[dict[str, float]] = []
    evals = [_evaluated(training)]
    diverged_at: int | None = None
    while training.trainer.version < job["steps"] and diverged_at is None:
        try:
            metrics.append(training.step())
        except NonFiniteError:
            diverged_at = training.trainer.version
        version = training.trainer.version
        if version % job["eval_every"] == 0 or version == job["steps"] or diverged_at is not None:
            evals.append(_evaluated(training))
    every = math.ceil(job["steps"] / CURVE_POINTS)
    last = evals[1:][-LAST_EVALS:]
    explained = [figures["explained_variance"] for figures in last if "explained_variance" in figures]
    return {
        "accuracy": shared.mean([figures["accuracy"] for figures in last]),
        **({"fresh_explained_variance": shared.mean(explained)} if explained else {}),
        "diverged_at": diverged_at,
        "evals": evals,
        "last_half": shared.means_of([_only(FIGURES, record) for record in metrics[len(metrics) // 2 :]]),
        "curve_every": every,
        "curves": {
            name: shared.thinned([record[name] for record in metrics], every)
            for name in CURVES
            if metrics and all(name in record for record in metrics)
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def _evaluated(training: DelayedTraining) -> dict[str, float]:
    found = {"version": training.trainer.version, "accuracy": round(training.accuracy(), 4)}
    explained = training.fresh_explained_variance(FRESH_GROUPS)
    return found if explained is None else found | {"explained_variance": round(explained, 4)}


def _only(names: Sequence[str], metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in names if name in metrics}


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print("a worker of the studies: python -m benchmarks.studies.delayed_sampling CPU < JOBS", file=sys.stderr)
        return 2
    common.pin(int(sys.argv[1]))
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shared.serve(run_job)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The life of one lease: prompt → completions → proven versions → rewards → group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from asyncrl.errors import EngineError, NonFiniteError
from asyncrl.generator.engines.base import Completion, GenerationRequest, RolloutEngine, nothing
from asyncrl.generator.weight_phases import WeightSync
from asyncrl.link.wire_types import FailureReason
from asyncrl.rewards.pool import RewardOutcome, RewardPool
from asyncrl.types import Group, Lease, LeaseKey, LeaseKind, Rollout, min_rollouts


@dataclass(frozen=True, slots=True)
class LeaseFailure:
    """Why a lease ended without a group; its prompt is leased again."""

    reason: FailureReason
    detail: str


def no_text(token_ids: np.ndarray) -> str:
    """No text of the prompt, for rewards that do not read it."""
    return ""


class LeaseRunner:
    """Turns leases into groups. Between leases it keeps counters alone.

    prompt_text turns a prompt's tokens into the text that parts of the reward see. on_change is called when a lease
    begins to wait for the proof of its versions.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: RewardPool,
        sync: WeightSync,
        *,
        commit_timeout_s: float,
        on_sequence_end: Callable[[], None] = nothing,
        prompt_text: Callable[[np.ndarray], str] = no_text,
        on_change: Callable[[], None] = nothing,
    ) -> None:
        self._engine = engine
        self._rewards = rewards
        self._sync = sync
        self._commit_timeout_s = commit_timeout_s
        self._on_sequence_end = on_sequence_end
        self._prompt_text = prompt_text
        self._on_change = on_change
        self.num_unproven = 0  # leases that have rewards, and wait for the proof of their versions
        self._left: dict[LeaseKey, int] = {}  # sequences still to be sampled, of leases at work
        self.rollouts_completed = 0
        self.rewards_failed = 0
        self.generations_failed = 0

    async def run(self, lease: Lease) -> Group | LeaseFailure:
        """The lease's group, or why there is none. Ends by the lease's deadline, whatever the parts do."""
        request_id = "-".join(str(part) for part in lease.key)
        self._left[lease.key] = lease.num_sequences
        try:
            async with asyncio.timeout(lease.deadline_s):
                return await self._run(lease, request_id)
        except TimeoutError:
            await self._abort(lease, request_id)
            return LeaseFailure(FailureReason.DEADLINE, f"no group within the lease's {lease.deadline_s:.0f} s")
        except asyncio.CancelledError:
            await self._abort(lease, request_id)
            raise
        finally:
            self._left.pop(lease.key, None)

    def sequences_left(self, lease: Lease) -> int:
        """Sequences of a lease in hand that are still to be sampled: what it asks of the engine from now on."""
        return self._left.get(lease.key, lease.num_sequences)

    def _sequence_ended(self, key: LeaseKey) -> None:
        if key in self._left:  # else the lease ended before its sequences did
            self._left[key] -= 1
            self._on_sequence_end()

    async def _run(self, lease: Lease, request_id: str) -> Group | LeaseFailure:
        began_at = self._sync.num_loads
        try:
            completions = await self._sample(lease, request_id)
        except (EngineError, NonFiniteError) as error:
            await self._abort(lease, request_id)  # what else the lease samples is of no use
            self.generations_failed += 1
            # Not "engine", which counts against the prompt, when it was the weights.
            return LeaseFailure(FailureReason.TAINTED if self._engine.tainted else FailureReason.ENGINE, str(error))
        versions = {span.version for completion in completions for span in completion.version_spans}
        if lease.pinned_version is not None and versions != {lease.pinned_version}:
            return LeaseFailure(
                FailureReason.NOT_PINNED, f"sampled under {sorted(versions)}, wanted {lease.pinned_version} alone"
            )
        # Rewards run while the commit may still be on its way: both are waited for, neither delays the other.
        outcomes = await self._score(lease, completions)
        self.num_unproven += 1
        self._on_change()
        try:
            await self._sync.wait_proven(versions, self._commit_timeout_s, since=began_at)
        except EngineError as error:
            self.generations_failed += 1
            return LeaseFailure(FailureReason.TAINTED, str(error))
        finally:
            self.num_unproven -= 1
        return self._group(lease, completions, outcomes)

    async def _sample(self, lease: Lease, request_id: str) -> list[Completion]:
        """The lease's completions; the greedy one, if it is wanted, comes last."""
        request = self._request(lease, request_id)
        if not lease.greedy_baseline:
            return await self._engine.generate(request)
        greedy = replace(request, request_id=_greedy_id(request_id), num_rollouts=1, temperature=0.0, seeds=None)
        sampled, baseline = await asyncio.gather(self._engine.generate(request), self._engine.generate(greedy))
        return sampled + baseline

    async def _score(self, lease: Lease, completions: list[Completion]) -> list[RewardOutcome]:
        texts = [completion.text for completion in completions]
        num_tokens = [len(completion.token_ids) for completion in completions]
        rendered = self._prompt_text(lease.prompt_token_ids)
        if not lease.user_text:
            return await self._rewards.score(texts, lease.payload, rendered, num_tokens)
        return await self._rewards.score(texts, lease.payload, lease.user_text, num_tokens, rendered_prompt=rendered)

    async def _abort(self, lease: Lease, request_id: str) -> None:
        await self._engine.abort(request_id)
        if lease.greedy_baseline:
            await self._engine.abort(_greedy_id(request_id))

    def _request(self, lease: Lease, request_id: str) -> GenerationRequest:
        seeds = None
        if lease.seed is not None:
            seeds = tuple(lease.seed + index for index in range(lease.num_rollouts))
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=lease.prompt_token_ids.tolist(),
            num_rollouts=lease.num_rollouts,
            max_new_tokens=lease.max_new_tokens,
            temperature=lease.temperature,
            seeds=seeds,
            on_sequence_end=lambda: self._sequence_ended(lease.key),
        )

    def _group(
        self, lease: Lease, completions: list[Completion], outcomes: list[RewardOutcome]
    ) -> Group | LeaseFailure:
        self.rewards_failed += sum(outcome.failed for outcome in outcomes)
        self.rollouts_completed += len(completions)
        baseline = None
        if lease.greedy_baseline:
            *outcomes, greedy = outcomes
            if greedy.failed:
                return LeaseFailure(
                    FailureReason(greedy.reason), f"the reward of the greedy completion failed: {greedy.detail}"
                )
            baseline = greedy.reward
            completions = completions[:-1]
        failed = [outcome for outcome in outcomes if outcome.failed]
        if len(outcomes) - len(failed) < _enough(lease):
            return LeaseFailure(
                FailureReason(failed[0].reason), f"{len(failed)} of {len(outcomes)} rewards failed: {failed[0].detail}"
            )
        rollouts = [
            Rollout(
                token_ids=completion.token_ids,
                behaviour_logprobs=completion.logprobs,
                version_spans=completion.version_spans,
                finish_reason=completion.finish_reason,
                reward=outcome.reward,
                reward_parts=outcome.parts,
            )
            for completion, outcome in zip(completions, outcomes, strict=True)
            if outcome.parts is not None
        ]
        return Group(lease.key, lease.prompt_token_ids, rollouts, baseline)


def _enough(lease: Lease) -> int:
    """How many rollouts must have a reward: all of an evaluation, and of a training group enough to compare."""
    return lease.num_rollouts if lease.key.kind is LeaseKind.EVAL else min_rollouts(lease.num_rollouts)


def _greedy_id(request_id: str) -> str:
    return f"{request_id}-greedy"

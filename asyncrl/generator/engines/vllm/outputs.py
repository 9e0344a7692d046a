"""vLLM's outputs as completions and scores, checked: what is missing or not finite is an error, never a number.

And what they tell of the steps that brought them: vLLM sends those of each step as one message with its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asyncrl.errors import EngineError, NonFiniteError
from asyncrl.generator.engines.base import Completion
from asyncrl.generator.engines.step_times import StepTimes
from asyncrl.types import FinishReason, VersionSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def completion_from(sample: Any, tokenizer: PreTrainedTokenizerBase, request_id: str) -> Completion:
    """A finished vLLM CompletionOutput with flat log-probs.

    Raises:
        EngineError: it did not end by itself or by its limit, or log-probs or versions do not cover its tokens.
        NonFiniteError: a log-prob is not finite.
    """
    if sample.finish_reason not in ("stop", "length"):
        raise EngineError(f"request {request_id}: the engine ended it as {sample.finish_reason!r}")
    token_ids = np.asarray(sample.token_ids, dtype=np.int32)
    logprobs = np.asarray(sample.logprobs.logprobs, dtype=np.float32)
    spans = tuple(VersionSpan(span.start, span.end, int(span.version)) for span in sample.weight_versions)
    if logprobs.shape != token_ids.shape or not spans or spans[-1].stop != len(token_ids):
        raise EngineError(
            f"request {request_id}: {len(token_ids)} tokens with {len(logprobs)} log-probs and versions {spans}"
        )
    _check_finite(logprobs, f"request {request_id}")
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str), "the text of one sequence is one text"
    return Completion(token_ids, logprobs, spans, FinishReason(sample.finish_reason), text)


def scores_from(output: Any, num_tokens: int) -> np.ndarray:
    """Log-probs of prompt tokens 1.. of a vLLM RequestOutput with flat prompt log-probs: float32 [num_tokens - 1].

    Raises:
        NonFiniteError: a log-prob is not finite.
    """
    found = output.prompt_logprobs
    # Position i holds the prompt's own token first, then (with a positive prompt_logprobs) the likeliest ones.
    first = [found.start_indices[i] for i in range(1, num_tokens)]
    scores = np.asarray([found.logprobs[i] for i in first], dtype=np.float32)
    _check_finite(scores, "a scored sequence")
    return scores


def time_steps(llm: Any, steps: StepTimes) -> None:
    """From now on `steps` hears of each step of this AsyncLLM.

    A prompt that is computed in chunks has outputs with the last one alone. So a step counts only if it brought outputs
    for all that vLLM knows of, as it does between two arrivals.
    """
    receive = llm.engine_core.get_output_async
    chunked = llm.vllm_config.scheduler_config.enable_chunked_prefill

    async def received() -> Any:
        step = await receive()
        if step.outputs:
            new = [output.prefill_stats for output in step.outputs if output.prefill_stats is not None]
            if chunked and len(step.outputs) < len(llm.output_processor.request_states):
                steps.interrupted()
            else:
                prompt_tokens = sum(stats.num_computed_tokens for stats in new)
                steps.ended(step.timestamp, len(step.outputs), prompt_tokens, continued=len(step.outputs) - len(new))
        return step

    llm.engine_core.get_output_async = received


def _check_finite(logprobs: np.ndarray, what: str) -> None:
    finite = np.isfinite(logprobs)
    if not finite.all():
        raise NonFiniteError(f"{what}: log-prob {logprobs[~finite][0]} at token {int(np.argmin(finite))}")

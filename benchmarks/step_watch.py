"""A worker of the real vLLM that notes its steps, for benchmarks of what a swap costs. Runs in the engine's process."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncrl.generator.weights import WeightWorkerExtension

EXTENSION = "benchmarks.step_watch.StepWatchExtension"


@dataclass(slots=True)
class Step:
    started: float
    ended: float
    decodes_only: bool
    off_course: int  # tokens that sequences in flight computed twice or not at all


class StepWatchExtension(WeightWorkerExtension):
    _steps: list[Step]

    def bench_watch(self) -> None:
        """Notes steps from now on."""
        self._steps, computed = [], {}
        execute, sample = self.execute_model, self.sample_tokens  # type: ignore[attr-defined]

        def noted_execute(scheduled: Any) -> Any:
            started = time.perf_counter()
            self._steps.append(Step(started, 0.0, not scheduled.scheduled_new_reqs, _off_course(scheduled, computed)))
            return execute(scheduled)

        def noted_sample(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            self._steps[-1].ended = time.perf_counter()
            return result

        self.execute_model, self.sample_tokens = noted_execute, noted_sample

    def bench_around(self, started: float, ended: float) -> dict[str, float]:
        """Of the steps around a swap between two times of `time.perf_counter`, in ms:

        gap_ms: the longest time between two steps' tokens; step_ms: a decode step (median of those
        in the second before); off_course: tokens computed twice or not at all from then on.
        """
        steps = [step for step in self._steps if step.ended]
        gaps = [
            after.ended - before.ended for before, after in pairwise(steps) if started < after.started < ended + 0.1
        ]
        decodes = [step for step in steps if step.decodes_only and started - 1.0 < step.ended < started]
        result = {
            "gap_ms": max(gaps) * 1e3,
            "step_ms": statistics.median(step.ended - step.started for step in decodes) * 1e3,
            "off_course": float(sum(step.off_course for step in self._steps)),
        }
        del self._steps[:-1]
        return result

    def bench_reload(self) -> None:
        """What vLLM does in a pause: a layerwise reload, here of the version that is in use."""
        engine = self.weight_transfer_engine
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            initialize_layerwise_reload(engine.model)
            engine.model.load_weights(engine.receiver.tensors())
            finalize_layerwise_reload(engine.model, engine.model_config)


def _off_course(scheduled: Any, computed: dict[str, int]) -> int:
    """Tokens by which sequences in flight do not go on where they were. `computed` is kept from step to step."""
    wrong = 0
    cached = scheduled.scheduled_cached_reqs
    for request, done in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        wrong += abs(done - computed.get(request, done)) + (scheduled.num_scheduled_tokens[request] - 1)
        computed[request] = done + scheduled.num_scheduled_tokens[request]
    for new in scheduled.scheduled_new_reqs:
        computed[new.req_id] = new.num_computed_tokens + scheduled.num_scheduled_tokens[new.req_id]
    for request in scheduled.finished_req_ids:
        computed.pop(request, None)
    return wrong

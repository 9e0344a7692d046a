"""A worker of the real vLLM that notes its steps, for benchmarks of what a swap costs. Runs in the engine's process."""

from __future__ import annotations

import statistics
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncrl.generator.engines.vllm.plugin import WeightWorkerExtension

EXTENSION = "benchmarks.speed.step_watch.StepWatchExtension"


@dataclass(slots=True)
class Step:
    started: float
    ended: float
    decodes_only: bool
    off_course: int  # tokens that sequences in flight computed twice or not at all


class StepWatchExtension(WeightWorkerExtension):
    _steps: list[Step]
    _changed_at: float

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

    def asyncrl_swap(self, version: int, reload: bool) -> dict[str, Any]:
        self._changed_at = time.perf_counter()
        return super().asyncrl_swap(version, reload)

    def bench_around(self) -> dict[str, float]:
        """Of the steps around the newest change of weights, in ms:

        standstill_ms: from the end of the last step before it to the start of the first one after it; between_ms: the
        same between other steps (median of the second before); step_ms: a decode step (likewise); off_course: tokens
        computed twice or not at all since the last call.
        """
        steps, changed_at = [step for step in self._steps if step.ended], self._changed_at
        gaps = [(before.ended, after.started) for before, after in pairwise(steps)]
        ((ended, started),) = [gap for gap in gaps if gap[0] < changed_at < gap[1]]
        second = (changed_at - 1.0, ended)
        decodes = [step for step in steps if step.decodes_only and second[0] < step.started < second[1]]
        between = [start - end for end, start in gaps if second[0] < end and start < second[1]]
        result = {
            "standstill_ms": (started - ended) * 1e3,
            "between_ms": statistics.median(between) * 1e3,
            "step_ms": statistics.median(step.ended - step.started for step in decodes) * 1e3,
            "off_course": float(sum(step.off_course for step in self._steps)),
        }
        del self._steps[:-1]
        return result

    def bench_start_child(self, command: list[str], folder: str) -> None:
        """Runs `command` beside the engine: on its CPU and in its session, which Linux may schedule as one."""
        subprocess.Popen(command, cwd=folder)  # dies with this process, by its own wish

    def bench_reload(self) -> None:
        """What vLLM does in a pause: a layerwise reload, here of the version that is in use."""
        engine, self._changed_at = self.weight_transfer_engine, time.perf_counter()
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

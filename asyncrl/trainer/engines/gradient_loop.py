"""The loop over micro-batches that every engine has: passes in order, gradients that add up, updates of all or none."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch

from asyncrl.algorithms.losses import Sums, merge_sums
from asyncrl.trainer.engines.base import EngineState, Gradients, LossFunction, Outputs, Want
from asyncrl.trainer.engines.device_rows import DeviceRows
from asyncrl.trainer.engines.part import TrainedPart
from asyncrl.trainer.packing import Rows


class PassClock:
    """What each pass takes: by the host's clock on a CPU, by events in its stream on a GPU, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """The end of a pass, and the beginning of the next one."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.monotonic())

    def seconds(self) -> tuple[float, ...]:
        """Between each two marks. On a GPU it waits for the last one."""
        if self._events:
            self._events[-1].synchronize()
        times = [end - begin for begin, end in pairwise(self._times)]
        return (*times, *(begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self._events)))


class GradientLoop(ABC):
    """What all engines have in common; see `ModelEngine` for the methods."""

    def __init__(self, policy: TrainedPart | None, critic: TrainedPart | None) -> None:
        self._policy = policy
        self._critic = critic
        self._pending: list[TrainedPart] = []  # parts whose gradients wait for `update` or `discard`

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """See `ModelEngine.device`."""

    @abstractmethod
    def _outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        """One forward pass; without `train_policy` the policy's part of it leaves no graph."""

    def _begin_pass(self, *, is_last: bool) -> None:
        """Before each forward pass whose gradients add up; `is_last`: no other follows before the update."""
        return

    def _over_ranks(self, sums: Sums) -> Sums:
        """The sums of all ranks from those of this one."""
        return sums

    def forward(self, rows: Sequence[Rows | DeviceRows], want: Want, temperature: float) -> list[Outputs]:
        """See `ModelEngine.forward`."""
        with torch.no_grad():
            return [self._outputs(batch, want, temperature, train_policy=False) for batch in rows]

    def accumulate(
        self,
        rows: Sequence[Rows | DeviceRows],
        want: Want,
        temperature: float,
        loss: LossFunction,
        *,
        max_norm: float,
        train_policy: bool = True,
    ) -> Gradients:
        """See `ModelEngine.accumulate`."""
        self.discard()
        policy, critic = self._policy if train_policy else None, self._critic
        self._pending = [part for part in (policy, critic) if part is not None]

        def backward(index: int, batch: Rows | DeviceRows) -> Sums:
            self._begin_pass(is_last=index == len(rows) - 1)
            total, sums = loss(index, self._outputs(batch, want, temperature, train_policy=train_policy))
            if self._pending:
                torch.autograd.backward(total)
            return sums

        sums: Sums = {}
        clock = PassClock(self.device)
        clock.mark()
        for index, batch in enumerate(rows):
            sums = merge_sums(sums, backward(index, batch))
            clock.mark()
        return Gradients(
            self._over_ranks(sums),
            policy_norm=None if policy is None else policy.clip(max_norm),
            critic_norm=None if critic is None else critic.clip(max_norm),
            pass_s=clock.seconds(),  # behind the norms, which wait for a GPU anyway
        )

    def update(self) -> None:
        """See `ModelEngine.update`."""
        for part in self._pending:
            part.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """See `ModelEngine.discard`."""
        for part in (self._policy, self._critic):
            if part is not None:
                part.optimizer.zero_grad(set_to_none=True)
        self._pending = []

    def state(self) -> EngineState:
        """See `ModelEngine.state`."""
        return EngineState(
            policy=None if self._policy is None else self._policy.state(),
            critic=None if self._critic is None else self._critic.state(),
        )

    def load_state(self, state: EngineState) -> None:
        """See `ModelEngine.load_state`."""
        for part, part_state in ((self._policy, state.policy), (self._critic, state.critic)):
            if part is not None:
                assert part_state is not None, "the state lacks a part of this engine"
                part.load(part_state)

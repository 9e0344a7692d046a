"""Parameters that share a gradient norm, an optimizer and a learning rate: the policy, or the critic.

All is kept by the names of a checkpoint, and nothing here asks whether a tensor is whole: a parameter may be a DTensor,
of which this rank holds some rows. `local` is what a rank holds of either kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from asyncrl.config import LearnerConfig
from asyncrl.trainer.engines.base import PartState
from asyncrl.trainer.replicas import agreed_norm

SETTINGS = ("lr", "betas", "weight_decay")  # of the optimizer: what the configuration sets


class TrainedPart:
    """Parameters, what a checkpoint holds of them, and their AdamW."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], weights: dict[str, Tensor], learner: LearnerConfig, lr: float
    ) -> None:
        """`parameters` are trained, a tied one once; `weights` is what a checkpoint holds of them, by reference.

        Names of the first are among those of the second, which may hold buffers besides.
        """
        assert parameters.keys() <= weights.keys(), sorted(parameters.keys() - weights.keys())
        self.parameters = list(parameters.values())
        self.weights = weights
        self.optimizer = make_optimizer(self.parameters, learner, lr)
        self._named = parameters

    def clip(self, max_norm: float) -> float:
        """Scales the gradient to `max_norm` where it is larger; returns its norm before. Waits for the device."""
        for parameter in self.parameters:
            # A batch without gradient is a step like any other: momentum and weight decay act on it too.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        norm = agreed_norm(norm)
        nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return float(norm)

    def state(self) -> PartState:
        """All that training changes, by reference."""
        state = self.optimizer.state
        moments = {name: dict(state[parameter]) for name, parameter in self._named.items() if parameter in state}
        return PartState(self.weights, moments, tuple(self._named))

    @torch.no_grad()
    def load(self, state: PartState) -> None:
        """Copies a state in. Its tensors are like those here, or plain ones of what this rank holds of them.

        Settings of the optimizer stay those of the configuration: a run may go on with others.
        """
        for name, target in self.weights.items():
            local(target).copy_(local(state.weights[name]))
        self.optimizer.state.clear()
        for name, saved in state.optimizer.items():
            self.optimizer.state[self._named[name]] = {
                key: _moment(self._named[name], value) for key, value in saved.items()
            }


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of a plain one. Shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_optimizer(parameters: list[nn.Parameter], learner: LearnerConfig, lr: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms and biases."""
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": learner.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(learner.betas[0], learner.betas[1]),
        fused=True,
    )


def names_by_number(state: PartState) -> list[str]:
    """The trained parameters as torch numbers them in an optimizer's state dict: matrices first, then vectors."""
    matrices = [name for name in state.trained if state.weights[name].dim() >= 2]
    return matrices + [name for name in state.trained if state.weights[name].dim() < 2]


def by_name(numbered: dict[str, Any], state: PartState) -> dict[str, dict[str, Tensor]]:
    """An optimizer's state dict of a release that kept parameters by number, as `PartState.optimizer` has it.

    Raises ValueError when the numbers are not those of the parameters of `state`.
    """
    names = names_by_number(state)
    saved: dict[int, dict[str, Tensor]] = numbered["state"]
    if saved and saved.keys() != set(range(len(names))):
        raise ValueError(f"the optimizer state is of {len(saved)} parameters, the model trains {len(names)}")
    return {names[number]: moments for number, moments in saved.items()}


def _moment(parameter: nn.Parameter, saved: Tensor) -> Tensor:
    """A tensor of the optimizer's own with the values of `saved`: beside its parameter, or a count of steps."""
    if saved.dim() == 0:
        # The fused kernel wants it where the parameter is.
        return local(saved).to(device=parameter.device, dtype=torch.float32, copy=True)
    moment = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    local(moment).copy_(local(saved))
    return moment.detach()

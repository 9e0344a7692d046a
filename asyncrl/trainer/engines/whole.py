"""Rank 0's whole copy of a sharded policy, on the CPU: for what is published."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from asyncrl.trainer.engines.policy import Policy


class WholePolicy:
    """A policy on rank 0 into which the shards of all ranks are gathered; elsewhere nothing."""

    def __init__(self, policy: Policy, *, is_here: bool) -> None:
        """`policy` is whole still; it is copied where `is_here`."""
        self.policy = copy.deepcopy(policy) if is_here else None

    @torch.no_grad()
    def refresh(self, sharded: Policy) -> None:
        """Takes over what the shards hold now; a collective, one tensor after another."""
        own = {} if self.policy is None else self.policy.checkpoint_tensors()
        for name, tensor in sharded.checkpoint_tensors().items():
            whole = whole_tensor(tensor)
            if own:
                own[name].copy_(whole)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor of which ranks hold some; a collective. A plain tensor is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

"""Log-probs of the canary under the weights of a snapshot, in the publisher's thread while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from asyncrl.trainer.engines.lora import adapter_layers
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.trainable import named_parameters
from asyncrl.weights.bytes.snapshot import SnapshotBuffer


class SnapshotScorer:
    """Scores sequences as the policy would with the weights that a snapshot holds.

    Works on modules of its own: the policy's may be in the middle of a step. They take no memory: published
    tensors are read from the snapshot, all others are frozen and shared with the policy. For one thread at a time.

    The weights are those on the wire, rounded to its dtype as the generators get them. Compute follows `Policy`: where
    the wire is bfloat16, layers take their matrices as autocast would have cast them, and what a float32 policy keeps
    in float32 (norms, embedding, head) is widened for the time of the call.

    Sequences take the layouts that training uses: where it has shared rows, every second one, the first among them,
    goes through a shared row. A model that computes something else there does not agree with its generators.
    """

    def __init__(self, policy: Policy, *, shared_rows: bool = False) -> None:
        """`shared_rows`: whether training lays out short completions in shared rows."""
        self._shared_rows = shared_rows
        source = policy.sync_source()
        names = {name for name, _ in source.named}
        named = named_parameters(policy.model)
        published = {id(parameter) for name, parameter in named if name in names}
        own: dict[int, nn.Parameter] = {}
        for _, parameter in named:
            if id(parameter) in published or parameter.requires_grad:
                own[id(parameter)] = nn.Parameter(torch.empty_like(parameter[:0]), requires_grad=False)
        shared = {id(parameter): parameter for _, parameter in named if id(parameter) not in own}
        model = copy.deepcopy(policy.model, {**shared, **own})
        if source.adapted:  # published merged: the modules' own adapters would count twice
            for _, layer in adapter_layers(model):
                layer.enable_adapters(False)
        self._places = {name: own[id(parameter)] for name, parameter in named if name in names}
        self._policy = copy.copy(policy)
        self._policy.model = model
        self._policy.head_weight = model.get_output_embeddings().weight
        self._wide = {id(self._policy.head_weight), id(model.get_input_embeddings().weight)}

    def __call__(self, sequences: Sequence[Sequence[int]], snapshot: SnapshotBuffer) -> list[np.ndarray]:
        """Log-probs at temperature 1, float32 [L - 1] per sequence of L tokens; see `Policy.score`.

        `snapshot` holds what `Policy.sync_source` names and does not change meanwhile.
        """
        empty = {name: place.data for name, place in self._places.items()}
        try:
            for name, tensor in snapshot.views():
                place = self._places[name]
                narrow = tensor.dim() > 1 and id(place) not in self._wide
                place.data = tensor if narrow else tensor.to(empty[name].dtype)
            return self._score(sequences)
        finally:
            for name, place in self._places.items():
                place.data = empty[name]

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        if not self._shared_rows:
            return self._policy.score(sequences)
        scores: list[np.ndarray] = [np.empty(0)] * len(sequences)
        scores[0::2] = self._policy.score_in_shared_rows(sequences[0::2])
        scores[1::2] = self._policy.score(sequences[1::2])
        return scores

"""A peer that is admitted like any generator, and answers leases that were granted to others.

It has seen every grant on the wire, tickets included, and sends groups of its own making for them. Nobody sampled their
tokens: the checker knows by their numbers.
"""

from __future__ import annotations

import asyncio
import io
import random
from dataclasses import replace

import numpy as np

from asyncrl.config import Config
from asyncrl.generator.assembly import _session
from asyncrl.generator.identity import Identity
from asyncrl.link.codec import encode
from asyncrl.link.rollouts import group_to_result
from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan
from tests.simulation.checker import Checker
from tests.simulation.network import MAX_FRAME_BYTES, Dealer, Network

FORGED = 900_000_000  # the numbers of its completions begin here


class Forger:
    """One such peer."""

    def __init__(self, network: Network, config: Config) -> None:
        self._network = network
        self._config = config
        self._num_forged = 0
        self._seq = 0
        self._socket = Dealer(network, "forger", sent=lambda frame: None, read=lambda frame: None)

    async def forge(self, chance: random.Random, checker: Checker) -> None:
        """Says hello, and sends a group for each training lease that is under way."""
        session = _session(self._config, Identity("forger", 1, io.StringIO()))
        session._hello = replace(session._hello, instance="forger", max_run_epoch=0, first_unacked_seq=self._seq + 1)
        for frame in session.due(asyncio.get_running_loop().time() + 10.0):
            self._socket.send(frame)
        await asyncio.sleep(chance.uniform(0.1, 1.0))
        open_leases = [key for key in checker.granted if key[0] is LeaseKind.TRAIN and key[1] not in checker.settled]
        for key in open_leases[-4:]:
            self._seq += 1
            grant = checker.grants[key]
            group = self._group(LeaseKey(*key), grant.issued_version)
            result = group_to_result(group, self._seq, grant.run_epoch, chance.choice((grant.ticket, b"")))
            self._socket.send(encode(result, max_bytes=MAX_FRAME_BYTES))

    def _group(self, key: LeaseKey, version: int) -> Group:
        return Group(key, np.array([key.ordinal + 1], np.int32), [self._rollout(version) for _ in range(2)])

    def _rollout(self, version: int) -> Rollout:
        self._num_forged += 1
        return Rollout(
            token_ids=np.array([FORGED + self._num_forged, 1], np.int32),
            behaviour_logprobs=np.array([-1.0, -1.0], np.float32),
            version_spans=(VersionSpan(0, 2, version),),
            finish_reason=FinishReason.STOP,
            reward=float(self._num_forged % 5),
            reward_parts={"sim": float(self._num_forged % 5)},
        )

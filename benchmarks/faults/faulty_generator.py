"""asyncrl-generator with a saboteur inside: the real daemon and engine, to which one ordered fault at a time happens.

    python -m benchmarks.faults.faulty_generator CONFIG [KEY=VALUE ...]      as a member of a `fleet.Fleet`

The folder named by the environment variable ASYNCRL_FAULTS holds, for each generator:

- NAME.order.json, written by the driver: {"id", "fault", "phase"}. Carried out once, at the next sync that reaches it.
- NAME.events.jsonl, written here: what happened when (time.monotonic(), one clock for all processes of a machine).

What a fault is in which phase is told in `benchmarks.faults.fault_matrix`. This module does what happens in the daemon;
`benchmarks.faults.faulty_worker` what happens where weights arrive, in the engine's process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.cli.common import command
from asyncrl.config import Config
from asyncrl.generator.assembly import serve_generator, take_identity
from asyncrl.generator.daemon import GeneratorParts
from asyncrl.generator.engines.vllm.engine import VLLMEngine
from asyncrl.generator.engines.vllm.options import EngineOptions
from asyncrl.generator.lease_runner import LeaseRunner
from asyncrl.generator.weight_phases import WeightSync
from asyncrl.link.messages import SyncAbort, SyncCommit, SyncOffer, SyncReply, SyncSwap
from asyncrl.link.schema.message_base import Message
from asyncrl.types import LOGPROB_DTYPE, Group, Lease
from benchmarks.faults.fleet import own_mark, signal_marked

FOLDER = "ASYNCRL_FAULTS"
WORKER = "benchmarks.faults.faulty_worker.FaultyWorker"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
OFF = 1e-3  # nats; the canary's tolerance in float32 is 1e-4
REPLIED_LOGPROBS = ("OFFER", "STAGE", "VERIFY", "CANARY", "COMMIT")  # phases whose `canary` fault is in the answer


@dataclass(frozen=True, slots=True)
class Order:
    """One fault to be carried out."""

    id: str
    fault: str
    phase: str


class Saboteur:
    """Reads orders and writes events, in one process of a generator."""

    def __init__(self, folder: Path, name: str) -> None:
        self._order_path = folder / f"{name}.order.json"
        self._events_path = folder / f"{name}.events.jsonl"
        self._done: set[str] = set()

    @classmethod
    def of_this_process(cls) -> Saboteur:
        return cls(Path(os.environ[FOLDER]), own_mark().split("/")[1])

    def take(self, phase: str, *faults: str) -> Order | None:
        """The order, if it is for this phase and one of these faults; it is given out once."""
        try:
            order = Order(**json.loads(self._order_path.read_text()))
        except FileNotFoundError:
            return None
        if order.phase != phase or order.fault not in faults or order.id in self._done:
            return None
        self._done.add(order.id)
        return order

    def carried_out(self, order: Order, version: int, what: str) -> None:
        """To be called at the fault, before what would end this process."""
        self.note("fault", id=order.id, version=version, what=what)

    def signal(self, phase: str, version: int) -> None:
        """Kills or stops all processes of this generator, if that is ordered for this phase."""
        if order := self.take(phase, *SIGNALS):
            number = SIGNALS[order.fault]
            self.carried_out(order, version, number.name)
            signal_marked(own_mark(), number)

    def note(self, event: str, **details: Any) -> None:
        line = json.dumps({"event": event, "at": time.monotonic(), **details}) + "\n"
        file = os.open(self._events_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())  # in one piece: several processes write to it
        finally:
            os.close(file)


# -- the daemon's part in a sync ---------------------------------------------------------------------------------------


class FaultyEngine:
    """The engine, seen from the sync."""

    def __init__(self, engine: Any, saboteur: Saboteur) -> None:
        self._engine, self._saboteur = engine, saboteur

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def score(self, sequences: list[list[int]], timeout_s: float) -> list[np.ndarray]:
        version = self._engine.version
        self._saboteur.signal("CANARY", version)
        if order := self._saboteur.take("CANARY", "digest"):
            self._saboteur.carried_out(order, version, "the sequences are scored back to front")
            sequences = [sequence[::-1] for sequence in sequences]
        return await self._engine.score(sequences, timeout_s)


class FaultyWeightSync(WeightSync):
    """The daemon's side of a sync. Also tells when it was told what, and what it held."""

    def __init__(self, engine: Any, send: Any) -> None:
        self.saboteur = Saboteur.of_this_process()
        self.failed_at: dict[int, float] = {}  # version -> when its weights, in use until then, were found unproven
        self._send_on = send
        super().__init__(FaultyEngine(engine, self.saboteur), self._send_reply)

    def handle(self, message: SyncOffer | SyncSwap | SyncCommit | SyncAbort) -> None:
        kind = type(message).__name__.removeprefix("Sync").lower()
        self.saboteur.note(kind, version=message.version, attempt=message.attempt)
        changed: SyncOffer | SyncSwap | SyncCommit | SyncAbort | None = message
        match message:
            case SyncOffer():
                changed = self._offered(message)
            case SyncSwap():
                if order := self.saboteur.take("SWAP", "digest"):
                    self.saboteur.carried_out(order, message.version, "the swap names a version that is not staged")
                    changed = dataclasses.replace(message, version=message.version + 1)
            case SyncCommit():
                changed = self._committed(message)
        if changed is not None:
            super().handle(changed)

    def _offered(self, offer: SyncOffer) -> SyncOffer | None:
        self.saboteur.signal("OFFER", offer.version)
        order = self.saboteur.take("OFFER", "corrupt", "drop", "digest")
        if order is None:
            return offer
        if order.fault == "drop":
            self.saboteur.carried_out(order, offer.version, "the offer is lost")
            return None
        first, *rest = offer.manifest.digests
        digests = (first ^ 1, *rest) if order.fault == "corrupt" else tuple(digest ^ 1 for digest in (first, *rest))
        changed = "a byte of the manifest's digests" if order.fault == "corrupt" else "all digests of the manifest"
        self.saboteur.carried_out(order, offer.version, f"{changed} changed on the way")
        return dataclasses.replace(offer, manifest=dataclasses.replace(offer.manifest, digests=digests))

    def _committed(self, commit: SyncCommit) -> SyncCommit | None:
        self.saboteur.signal("COMMIT", commit.version)
        order = self.saboteur.take("COMMIT", "corrupt", "drop", "digest")
        if order is None:
            return commit
        if order.fault == "drop":
            self.saboteur.carried_out(order, commit.version, "the commit is lost")
            return None
        version = commit.version ^ 64 if order.fault == "corrupt" else commit.version - 1
        self.saboteur.carried_out(order, commit.version, f"the commit says version {version}")
        return dataclasses.replace(commit, version=version)

    def _send_reply(self, message: Message) -> None:
        assert isinstance(message, SyncReply)
        if message.error:
            self._send_on(message)
        elif message.phase == "stage":
            self._send_on(self._staged(message))
        else:
            for reply in self._swapped(message):
                self._send_on(reply)

    def _staged(self, reply: SyncReply) -> SyncReply:
        order = self.saboteur.take("VERIFY", "drop", "digest")
        if order is None:
            return reply
        if order.fault == "drop":
            self.saboteur.carried_out(order, reply.version, "the digest of the last bucket is missing in the answer")
            return dataclasses.replace(reply, digests=[measured[:-1] for measured in reply.digests])
        self.saboteur.carried_out(order, reply.version, "the answer has another digest for the last bucket")
        return dataclasses.replace(reply, digests=[[*each[:-1], each[-1] ^ 1] for each in reply.digests])

    def _swapped(self, reply: SyncReply) -> list[SyncReply]:
        """What is sent instead of the canary's log-probs."""
        rows = [np.frombuffer(row, LOGPROB_DTYPE).copy() for row in reply.canary_logprobs]
        if order := self.saboteur.take("CANARY", "corrupt", "drop"):
            if order.fault == "drop":
                self.saboteur.carried_out(order, reply.version, "the answer with the log-probs is lost")
                return []
            largest = int(np.abs(rows[0]).argmax())
            rows[0].view(np.uint8)[largest * 4 + 3] ^= 1  # of the exponent: a factor of 4
            self.saboteur.carried_out(order, reply.version, "a byte of one log-prob changed")
            return [_with(reply, rows)]
        for phase in REPLIED_LOGPROBS:
            if order := self.saboteur.take(phase, "canary"):
                wrong, what = _off(phase, rows)
                self.saboteur.carried_out(order, reply.version, what)
                return [_with(reply, wrong), reply] if phase == "COMMIT" else [_with(reply, wrong)]
        return [reply]

    async def _settle(self, held: int | None) -> None:
        if held is None and self._loaded is not None:
            self.failed_at[self._loaded.version] = time.monotonic()
        await super()._settle(held)
        self.saboteur.note("held", version=held)


def _off(phase: str, rows: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Log-probs that are off, and in what way."""
    if phase == "CANARY":
        return rows[:-1], "the log-probs of one sequence are missing"
    rows = [row.copy() for row in rows]
    if phase == "STAGE":
        rows[-1][-1] -= OFF
        return rows, f"one log-prob is off by {OFF}"
    if phase == "VERIFY":
        rows[-1][-1] = np.nan
        return rows, "one log-prob is not a number"
    rows = [row - np.float32(OFF) for row in rows]
    return rows, f"all log-probs are off by {OFF}" + (", then the right ones follow" if phase == "COMMIT" else "")


def _with(reply: SyncReply, rows: list[np.ndarray]) -> SyncReply:
    return dataclasses.replace(reply, canary_logprobs=[row.tobytes() for row in rows])


# -- the daemon's part in the rollouts ---------------------------------------------------------------------------------


class WatchedRunner(LeaseRunner):
    """Tells of every group that was begun before weights of one of its versions were found unproven."""

    async def run(self, lease: Lease) -> Any:
        started = time.monotonic()
        outcome = await super().run(lease)
        sync = self._sync
        assert isinstance(sync, FaultyWeightSync)
        if isinstance(outcome, Group):
            versions = {span.version for rollout in outcome.rollouts for span in rollout.version_spans}
            if tainted := [version for version in versions if sync.failed_at.get(version, started) > started]:
                sync.saboteur.note("tainted group", key=list(lease.key), versions=tainted)
        return outcome


def _engine_with_faults(options: EngineOptions) -> VLLMEngine:
    """The engine with the other half of the saboteur in its workers."""
    return VLLMEngine(options, worker_extension=WORKER)


PARTS = GeneratorParts(engine=_engine_with_faults, weight_sync=FaultyWeightSync, lease_runner=WatchedRunner)


def main() -> int:
    """The command, with its parts exchanged."""
    return command("generator", None, _start)


def _start(config: Config) -> int:
    identity = take_identity(config)
    Saboteur.of_this_process().note("started", incarnation=identity.incarnation)
    return serve_generator(config, identity, PARTS)


if __name__ == "__main__":
    sys.exit(main())

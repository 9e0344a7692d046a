"""The half of the saboteur that sits where weights arrive: vLLM's worker. See `benchmarks.faults.faulty_generator`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncrl.generator.engines.vllm.plugin import StagedWeightTransferEngine, WeightWorkerExtension, receive_with
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.channels.channel import WeightChannel
from benchmarks.faults.faulty_generator import Saboteur

CORRUPTED = "norm.weight"  # the last of them is the model's own, which every token goes through
EXPONENT_BIT = 1  # of the highest byte of a little-endian float: 1.0 becomes 0.25

_saboteur = Saboteur.of_this_process()


@dataclass
class Arrival:
    """A version on its way into staging. One at a time: a worker has one job at work."""

    version: int
    num_digests: int
    measured: int = 0

    def next_index(self) -> int:
        """Of the bucket that is measured now."""
        index, self.measured = self.measured, self.measured + 1
        return index


_arrival = Arrival(-1, 0)


class FaultyChannel(WeightChannel):
    """Between the buckets before the one in the middle and the others is where STAGE happens."""

    def broadcast(
        self,
        parts: Sequence[torch.Tensor],
        timeout_s: float,
        on_part: Callable[[int], None] = lambda num_bytes: None,
        senders: Sequence[int] | None = None,
    ) -> None:
        """Receives the buckets, but for what is ordered."""
        deadline, index = time.monotonic() + timeout_s, len(parts) // 2
        origins = [0] * len(parts) if senders is None else senders
        super().broadcast(parts[:index], timeout_s, on_part, origins[:index])
        _saboteur.signal("STAGE", _arrival.version)
        rest = index
        if order := _saboteur.take("STAGE", "drop"):
            _saboteur.carried_out(order, _arrival.version, f"bucket {index} is not received")
            rest = index + 1
        super().broadcast(parts[rest:], deadline - time.monotonic(), on_part, origins[rest:])
        if order := _saboteur.take("STAGE", "corrupt"):
            parts[index][parts[index].numel() // 2] ^= 1
            _saboteur.carried_out(order, _arrival.version, f"a bit of bucket {index} changed on the way")


def faulty_digest(bucket: torch.Tensor) -> int:
    """Measures one bucket; the last one is where VERIFY happens."""
    index = _arrival.next_index()
    if index == _arrival.num_digests // 2 and (order := _saboteur.take("STAGE", "digest")):
        _saboteur.carried_out(order, _arrival.version, f"the digest of bucket {index} is measured wrongly")
        return digest(bucket) ^ 1
    if index == _arrival.num_digests - 1:
        _saboteur.signal("VERIFY", _arrival.version)
        if order := _saboteur.take("VERIFY", "corrupt"):
            bucket[-1] ^= 1
            _saboteur.carried_out(order, _arrival.version, "a bit of the staging buffer changed before its digest")
    return digest(bucket)


class FaultyTransferEngine(StagedWeightTransferEngine):
    """Receives over a channel and with a digest to which faults happen."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, open_channel=FaultyChannel, measure=faulty_digest)


receive_with(FaultyTransferEngine)


class FaultyWorker(WeightWorkerExtension):
    """Notes what is about to arrive, and does what happens while the engine stands still for a swap."""

    def asyncrl_stage(self, manifest: dict[str, Any], timeout_s: float, whole: bool) -> None:
        global _arrival
        _arrival = Arrival(manifest["version"], len(manifest["digests"]))
        super().asyncrl_stage(manifest, timeout_s, whole)

    def asyncrl_swap(self, version: int, reload: bool) -> dict[str, Any]:
        _saboteur.signal("SWAP", version)
        order = _saboteur.take("SWAP", "corrupt", "drop", "canary")
        if order is None:
            return super().asyncrl_swap(version, reload)
        if order.fault == "canary":
            _saboteur.carried_out(order, version, "the swap is reported and not done: the old weights stay in use")
            return {"error": "", "apply_ms": 0.0, "apply": "direct"}
        engine = self.weight_transfer_engine
        what = _corrupt(engine.receiver) if order.fault == "corrupt" else _leave_out(engine.receiver)
        _saboteur.carried_out(order, version, what)
        return super().asyncrl_swap(version, reload)


def _corrupt(receiver: Any) -> str:
    """Changes a byte of a verified buffer. Matrices were packed before the pause; a norm is copied in the swap."""
    name, tensor = [(name, tensor) for name, tensor in receiver.tensors() if name.endswith(CORRUPTED)][-1]
    before = float(tensor.view(-1)[0])
    tensor.view(-1).view(torch.uint8)[tensor.element_size() - 1] ^= EXPONENT_BIT
    return f"a byte of the verified {name} changed: {before:.4g} became {float(tensor.view(-1)[0]):.4g}"


def _leave_out(receiver: Any) -> str:
    """Leaves out what lies in the middle bucket when the staged weights are put in place."""
    assert receiver.prepared is not None, "the cell waits for a sync that was applied in place"
    layout, prepared = receiver.staged.layout, receiver.prepared
    index = len(layout.buckets) // 2
    start, stop = (receiver._held.buffer.data_ptr() + place for place in max(layout.buckets[index].pieces, key=_size))
    names = {name for name, tensor in receiver.tensors() if _overlaps(tensor, start, stop)}
    before = len(prepared.copies) + len(prepared.packs)
    prepared.copies[:] = [pair for pair in prepared.copies if not _overlaps(pair[1], start, stop)]
    prepared.packs[:] = [pack for pack in prepared.packs if not names & set(pack[0].weight.writes)]
    left_out = before - len(prepared.copies) - len(prepared.packs)
    assert left_out > 0, f"bucket {index} ({sorted(names)}) has no part in the swap"
    return f"bucket {index} is not put in place ({left_out} of {before} parameters)"


def _size(piece: tuple[int, int]) -> int:
    return piece[1] - piece[0]


def _overlaps(tensor: torch.Tensor, start: int, stop: int) -> bool:
    first = tensor.data_ptr()
    return first < stop and first + tensor.numel() * tensor.element_size() > start

"""A worker of the real vLLM that can be told to fail, for tests of what then happens. Runs in the engine's process."""

from __future__ import annotations

from asyncrl.generator.engines.vllm.plugin import StagedWeightTransferEngine, WeightWorkerExtension, receive_with
from asyncrl.weights.channels.channel import WeightChannel


class OddTransferEngine(StagedWeightTransferEngine):
    """Fails where its worker was told to."""

    def __init__(self, *args):
        super().__init__(*args, open_channel=self._open_channel)
        self.damage_next_bytes = self.break_next_finish = False

    def _open_channel(self, spec, device):
        return OddChannel(spec, device, self)

    def _end_reload(self):
        if self.break_next_finish:
            self.break_next_finish = False
            raise MemoryError("no memory for a padded layer")
        super()._end_reload()


class OddChannel(WeightChannel):
    def __init__(self, spec, device, engine):
        super().__init__(spec, device)
        self._engine = engine

    def broadcast(self, parts, timeout_s, on_part, senders):
        def damaged(num_bytes):
            if self._engine.damage_next_bytes:
                self._engine.damage_next_bytes = False
                parts[0][parts[0].numel() // 2] ^= 1
            on_part(num_bytes)

        super().broadcast(parts, timeout_s, damaged, senders)


receive_with(OddTransferEngine)


class OddWorkerExtension(WeightWorkerExtension):
    weight_transfer_engine: OddTransferEngine

    def odd_break_next_apply(self) -> None:
        """The next direct apply breaks off half-way."""
        direct = self.weight_transfer_engine.direct
        apply = direct.apply

        def broken(prepared, manifest):
            del direct.apply
            half = len(prepared.packs) // 2
            assert half, "nothing to break"
            prepared.packs[half] = (None, None)
            apply(prepared, manifest)

        direct.apply = broken

    def odd_break_next_finish(self) -> None:
        """The next reload breaks off when its layers are put back."""
        self.weight_transfer_engine.break_next_finish = True

    def odd_refuse_next_stage(self, rank: int) -> None:
        """Worker `rank` cannot begin the next stage."""
        receiver = self.weight_transfer_engine.receiver

        def refuse(*args, **options):
            del receiver.begin_stage
            raise RuntimeError("can't start new thread")

        if self.rank == rank:
            receiver.begin_stage = refuse

    def odd_damage_next_bytes(self, rank: int) -> None:
        """What worker `rank` receives next has one bit wrong."""
        self.weight_transfer_engine.damage_next_bytes = self.rank == rank

    def odd_change_slices(self, rank: int) -> None:
        """A bit of the staged slices of worker `rank` changes."""
        if self.rank == rank:
            self.weight_transfer_engine.receiver._held.buffer[100] ^= 1

    def odd_load_computed_tensors(self) -> None:
        """From now on the model computes on every tensor before it loads it."""
        model = self.weight_transfer_engine.model
        load = model.load_weights
        model.load_weights = lambda named: load((name, tensor * 1.0) for name, tensor in named)

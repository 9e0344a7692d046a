"""A worker of the real vLLM that can be told to fail, for tests of what then happens. Runs in the engine's process."""

from __future__ import annotations

from asyncrl.generator.engines.vllm import plugin
from asyncrl.generator.engines.vllm.plugin import WeightWorkerExtension
from asyncrl.weights.channels.channel import WeightChannel


class OddWorkerExtension(WeightWorkerExtension):
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
        finalize = plugin.finalize_layerwise_reload

        def broken(*args):
            plugin.finalize_layerwise_reload = finalize
            raise MemoryError("no memory for a padded layer")

        plugin.finalize_layerwise_reload = broken

    def odd_refuse_next_stage(self, rank: int) -> None:
        """Worker `rank` cannot begin the next stage."""
        receiver = self.weight_transfer_engine.receiver

        def refuse(*args):
            del receiver.begin_stage
            raise RuntimeError("can't start new thread")

        if self.rank == rank:
            receiver.begin_stage = refuse

    def odd_damage_next_bytes(self, rank: int) -> None:
        """What worker `rank` receives next has one bit wrong."""
        receive = WeightChannel.broadcast

        def damaged(group, parts, *args):
            WeightChannel.broadcast = receive
            receive(group, parts, *args)
            parts[0][parts[0].numel() // 2] ^= 1

        if self.rank == rank:
            WeightChannel.broadcast = damaged

    def odd_load_computed_tensors(self) -> None:
        """From now on the model computes on every tensor before it loads it."""
        model = self.weight_transfer_engine.model
        load = model.load_weights
        model.load_weights = lambda named: load((name, tensor * 1.0) for name, tensor in named)

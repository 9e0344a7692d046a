"""Direct apply against vLLM's own reload: on small modules through vLLM's reload functions, and in the real engine."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from torch import nn

from asyncrl.errors import EngineError
from asyncrl.link.weight_records import Patch, TensorEntry, WeightLayout, WeightManifest
from tests.conftest import VOCAB_SIZE, randomize, reference_logprobs, start_engine
from tests.generator.engines.checks import ODD_WORKER

HIDDEN = 32


class Fused(nn.Module):
    """Two projections in one weight, with a bias, on a rank that holds half of each; packed as vLLM packs them."""

    def __init__(self, dtype, rank=1, ranks=2):
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        super().__init__()
        self.rank, self.rows = rank, HIDDEN // ranks
        self.weight = nn.Parameter(torch.zeros(2 * self.rows, HIDDEN, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2 * self.rows, dtype=dtype), requires_grad=False)
        self.weight.weight_loader = self.bias.weight_loader = self.load
        self.quant_method = UnquantizedLinearMethod()

    def load(self, param, loaded, half):
        shard = loaded.narrow(0, self.rank * self.rows, self.rows)
        param.data.narrow(0, half * self.rows, self.rows).copy_(shard)


class Embedding(nn.Module):
    """More rows than the checkpoint has; the rest are zeros. Used by gather and as a packed head."""

    def __init__(self, dtype, rows=48):
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, HIDDEN, dtype=dtype), requires_grad=False)
        self.weight.weight_loader = self.load
        self.quant_method = UnquantizedEmbeddingMethod()

    def load(self, param, loaded):
        param[: len(loaded)].data.copy_(loaded)
        param[len(loaded) :].data.fill_(0)


class Norm(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN, dtype=dtype), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class Model(nn.Module):
    """A tied head, as vLLM ties it: two layers, one parameter, two names in the checkpoint."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed, self.fused, self.norm, self.head = Embedding(dtype), Fused(dtype), Norm(dtype), Embedding(dtype)
        self.head.weight = self.embed.weight
        self.change = lambda name, tensor: tensor

    def load_weights(self, named):
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        loaded = set()
        for name, sent in named:
            tensor = self.change(name, sent)
            layer, _, last = name.partition(".")
            if layer in ("left", "right"):
                param = getattr(self.fused, last)
                param.weight_loader(param, tensor, int(layer == "right"))
            else:
                param = self.get_parameter(name)
                getattr(param, "weight_loader", default_weight_loader)(param, tensor)
            loaded.add(name)
        return loaded

    def outputs(self):
        """All that depends on weights, and the plain ones."""
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).to(self.norm.weight.dtype)
        packed = [layer.cpu_linear(x, layer.weight, None) for layer in (self.fused, self.head, self.embed)]
        plain = self.fused.bias, self.embed.weight, self.head.weight, self.norm.weight
        return [*packed, *(parameter.detach().clone() for parameter in plain)]


def checkpoint(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (40, HIDDEN), "norm.weight": (HIDDEN,)}
    for half in ("left", "right"):
        shapes |= {f"{half}.weight": (HIDDEN, HIDDEN), f"{half}.bias": (HIDDEN,)}
    named = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return named | {"head.weight": named["embed.weight"]}


def manifest_of(named, version=1, patch=None):
    entries = tuple(TensorEntry(name, "float32", tuple(tensor.shape), 0) for name, tensor in named.items())
    return WeightManifest(version, WeightLayout(1 << 20, entries, ((0, 1 << 20),)), (0,), patch)


class Worker:
    """A model and its direct apply, driven as the weight receiver drives them."""

    def __init__(self, model):
        from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

        from asyncrl.generator.engines.vllm.direct_apply import DirectApply

        self.model = model
        record_metadata_for_reloading(model)
        for layer in model.modules():
            if hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)
        self.direct = DirectApply(model)

    def reload(self, named, manifest=None):
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        self.direct.begin()
        initialize_layerwise_reload(self.model)
        self.direct.load(self.model.load_weights, named.items())
        finalize_layerwise_reload(self.model, None)
        self.direct.end(manifest or manifest_of(named), named.items())

    def prepare(self, named, manifest=None):
        return self.direct.prepare(manifest or manifest_of(named), named.items())


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_give_what_a_reload_gives_bit_for_bit(dtype):
    worker, reference = Worker(Model(dtype)), Worker(Model(dtype))
    worker.reload(checkpoint(1))
    for seed in (2, 3, 4):
        prepared = worker.prepare(checkpoint(seed))
        before = worker.model.outputs()
        assert worker.direct.usable(prepared)
        assert same_bits(worker.model.outputs(), before), "preparing must leave the weights in use alone"
        worker.direct.apply(prepared, manifest_of({}))
        reference.reload(checkpoint(seed))
        assert same_bits(worker.model.outputs(), reference.model.outputs())
    assert not same_bits(before, worker.model.outputs())


def test_what_is_prepared_does_not_rest_on_the_staged_bytes_but_for_plain_copies():
    worker, reference = Worker(Model()), Worker(Model())
    worker.reload(checkpoint(1))
    named = checkpoint(2)
    prepared = worker.prepare(named)
    worker.direct.apply(prepared, manifest_of(named))
    for tensor in named.values():
        tensor.fill_(7.0)  # the next version arrives in the same buffer
    reference.reload(checkpoint(2))
    assert same_bits(worker.model.outputs(), reference.model.outputs())


def test_what_did_not_change_is_not_copied_again():
    worker, reference = Worker(Model()), Worker(Model())
    first, second = checkpoint(1), checkpoint(1) | {"left.weight": torch.randn(HIDDEN, HIDDEN)}
    frozen = tuple((name, 5) for name in first if name not in ("left.weight", "head.weight"))
    patch = Patch(base=frozen, tied=(("head.weight", "embed.weight"),))
    sent = {"left.weight": first["left.weight"]}
    worker.reload(first, manifest_of(sent, patch=patch))
    prepared = worker.prepare(second, manifest_of(sent, patch=patch))
    assert prepared.copies == [] and [pack.layer for pack, _ in prepared.packs] == [worker.model.fused]
    worker.direct.apply(prepared, manifest_of(sent, patch=patch))
    reference.reload(second)
    assert same_bits(worker.model.outputs(), reference.model.outputs())


def test_names_are_unchanged_when_both_manifests_leave_them_alone():
    from asyncrl.generator.engines.vllm.direct_apply import unchanged_names

    def manifest(base, tied=(), carried=()):
        named = {name: torch.zeros(1) for name in carried}
        return manifest_of(named, patch=Patch(base=tuple(base.items()), tied=tuple(tied)))

    base = {"a.weight": 1, "b.weight": 2, "c.weight": 3}
    tied = [("h.weight", "a.weight"), ("i.weight", "b.weight")]
    adapted = manifest(base, tied, ["b.lora_A.weight", "b.lora_B.weight"])
    assert unchanged_names(manifest(base, tied), manifest(base, tied)) == {*base, "h.weight", "i.weight"}
    for pair in [(adapted, manifest(base, tied)), (manifest(base, tied), adapted)]:
        assert unchanged_names(*pair) == {"a.weight", "c.weight", "h.weight"}
    assert unchanged_names(manifest({**base, "c.weight": 9}), manifest(base)) == {"a.weight", "b.weight"}
    assert unchanged_names(None, manifest(base)) == set()
    assert unchanged_names(manifest_of({"a.weight": torch.zeros(1)}), manifest(base)) == set()


def computed(model):
    model.change = lambda name, tensor: tensor * 1.0 if name == "right.weight" else tensor


def transposed(model):
    model.change = lambda name, tensor: tensor.t().contiguous() if name == "left.weight" else tensor


def loaded_in_place(model):
    def load(param, loaded):
        param.data.copy_(loaded)
        param.data.add_(1.0)

    model.norm.weight.weight_loader = load


def replaced(model):
    def load(param, loaded):
        param.data = torch.empty_like(param).copy_(loaded)

    model.norm.weight.weight_loader = load


def partly_loaded(model):
    def load(param, loaded):
        param.data[:-1].copy_(loaded[:-1])

    model.norm.weight.weight_loader = load


def unseen_parameter(model):
    process = model.fused.quant_method.process_weights_after_loading

    class Adding(type(model.fused.quant_method)):
        def process_weights_after_loading(self, layer):
            layer.scale = nn.Parameter(layer.weight.abs().max().reshape(1), requires_grad=False)
            process(layer)

    model.fused.quant_method = Adding()


def derived(model):
    process = model.fused.quant_method.process_weights_after_loading

    class Deriving(type(model.fused.quant_method)):
        def process_weights_after_loading(self, layer):
            layer.row_norms = layer.weight.norm(dim=1)
            process(layer)

    model.fused.quant_method = Deriving()


def derived_in_place(model):
    model.fused.row_norms = torch.zeros(HIDDEN)

    class Deriving(type(model.fused.quant_method)):
        def process_weights_after_loading(self, layer):
            if hasattr(layer, "row_norms"):
                layer.row_norms.copy_(layer.weight.norm(dim=1))
            super().process_weights_after_loading(layer)

    model.fused.quant_method = Deriving()


def scaled_when_processed(model):
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Scaling(QuantizeMethodBase):
        def create_weights(self, layer, *args, **kwargs):
            raise NotImplementedError

        def apply(self, layer, *args, **kwargs):
            raise NotImplementedError

        def process_weights_after_loading(self, layer):
            layer.weight.data.mul_(2.0)

    model.norm.quant_method = Scaling()


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        (computed, "fused.weight is loaded from a tensor that was computed on the way"),
        (transposed, "fused.weight is loaded from a tensor that was computed on the way"),
        (loaded_in_place, "norm.weight is changed by aten.add_.Tensor while it is loaded"),
        (replaced, "0 of 32 elements of norm.weight are copied"),
        (partly_loaded, "31 of 32 elements of norm.weight are copied"),
        (unseen_parameter, "fused.scale is a parameter that no loader sees"),
        (derived, "fused.row_norms is made anew at every load"),
        (derived_in_place, "fused.row_norms is made anew at every load"),
        (scaled_when_processed, "a parameter of shape (32,) has other values after a reload"),
    ],
)
def test_a_model_that_does_more_than_copy_keeps_to_reloads_and_the_log_says_why(oddity, reason, caplog):
    model = Model()
    oddity(model)
    worker = Worker(model)
    with caplog.at_level("WARNING", "vllm.asyncrl"):
        worker.reload(checkpoint(1))
    assert f"apply: reload. Weights cannot be copied directly: {reason}" in caplog.text
    assert worker.prepare(checkpoint(2)) is None and not worker.direct.usable(None)
    worker.reload(checkpoint(2))
    assert torch.equal(worker.model.embed.weight[:40], checkpoint(2)["embed.weight"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda named: named.pop("right.bias"), "right.bias does not come"),
        (lambda named: named.update({"norm.weight": torch.zeros(HIDDEN + 1)}), "norm.weight is (33,)"),
        (lambda named: named.update({"extra.weight": torch.zeros(1)}), "extra.weight is (1,)"),
    ],
)
def test_a_version_of_other_tensors_goes_through_a_reload(change, reason, caplog):
    worker = Worker(Model())
    worker.reload(checkpoint(1))
    named = checkpoint(2)
    change(named)
    assert worker.prepare(named) is None
    assert reason in caplog.text
    assert worker.direct.usable(worker.prepare(checkpoint(3))), "the plan still stands"


def test_after_a_failure_nothing_prepared_is_used_until_a_reload_proved_the_plan_again():
    worker = Worker(Model())
    worker.reload(checkpoint(1))
    prepared = worker.prepare(checkpoint(2))
    worker.direct.failed()
    assert not worker.direct.usable(prepared) and worker.prepare(checkpoint(3)) is None
    worker.reload(checkpoint(3))
    assert not worker.direct.usable(prepared)
    assert worker.direct.usable(worker.prepare(checkpoint(4)))


# -- the real engine -----------------------------------------------------------------------------------


@pytest.fixture
def odd_engine(tied_model_dir, tmp_path):
    """An engine of its own whose worker can be told to fail."""
    under_test = start_engine(tied_model_dir, tmp_path / "vllm.log", worker_extension=ODD_WORKER)
    under_test.notes["log"] = tmp_path / "vllm.log"
    yield under_test
    under_test.run(under_test.engine.close())
    under_test.runner.close()


def sync_and_check(engine, seed):
    """A sync of new weights; how it was applied."""
    randomize(engine.model, seed)
    version = engine.run(engine.sync())
    assert engine.engine.version == version and not engine.engine.tainted
    sequence = np.random.default_rng(seed).integers(2, VOCAB_SIZE, 60).tolist()
    (score,) = engine.run(engine.engine.score([sequence], 20.0))
    np.testing.assert_allclose(score, reference_logprobs(engine.model, sequence), atol=1e-4, rtol=0)
    return engine.notes["swap"].apply


def break_a_swap(engine):
    async def broken():
        await engine.engine._rpc("odd_break_next_apply", 5.0)
        version = await engine.stage_next(99)
        running = asyncio.create_task(engine.generate([5, 9, 33], max_new_tokens=180))
        await engine.until_begun()
        with pytest.raises(EngineError, match=f"could not load version {version}"):
            await engine.engine.swap_weights(version, 20.0)
        with pytest.raises(EngineError, match="tainted"):
            await running

    engine.run(broken())
    assert engine.engine.tainted and engine.engine.version is None
    with pytest.raises(EngineError, match="tainted"):
        engine.run(engine.generate([5, 9, 33]))


def break_a_reload(engine):
    engine.engine.taint("so that the next swap is a reload")

    async def broken():
        await engine.engine._rpc("odd_break_next_finish", 5.0)
        version = await engine.stage_next(98)
        with pytest.raises(EngineError, match="MemoryError: no memory for a padded layer; the engine is tainted"):
            await engine.engine.swap_weights(version, 20.0)

    engine.run(broken())
    assert engine.engine.tainted


def test_a_direct_apply_that_breaks_off_taints_a_reload_heals_and_a_loader_that_computes_is_not_bypassed(odd_engine):
    assert [sync_and_check(odd_engine, seed) for seed in (1, 2, 3)] == ["reload", "direct", "direct"]
    break_a_swap(odd_engine)
    assert [sync_and_check(odd_engine, seed) for seed in (4, 5)] == ["reload", "direct"]

    # Weights that were found wrong may rest on anything: nothing of them is built upon.
    odd_engine.engine.taint("the canary differs")
    assert [sync_and_check(odd_engine, seed) for seed in (6, 7)] == ["reload", "direct"]

    break_a_reload(odd_engine)
    assert [sync_and_check(odd_engine, seed) for seed in (8, 9)] == ["reload", "direct"]

    break_a_swap(odd_engine)
    odd_engine.run(odd_engine.engine._rpc("odd_load_computed_tensors", 5.0))
    assert [sync_and_check(odd_engine, seed) for seed in (10, 11, 12)] == ["reload"] * 3
    log = odd_engine.notes["log"].read_text()
    assert log.count("apply: direct.") == 4 and log.count("was computed on the way") == 1

"""The tensors that are not sent: what completes a sync, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from asyncrl.config import ModelConfig, UpdateConfig
from asyncrl.errors import ModelError, ProtocolError
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import WeightManifest
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.policy import load_policy
from asyncrl.weights.base_weights import BaseWeights, complete_names
from asyncrl.weights.bytes.layout import tensor_views
from asyncrl.weights.bytes.patch import fold_adapter
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.tolerances import assert_near

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
Q1 = "model.layers.1.self_attn.q_proj"
ADAPTERS = UpdateConfig(what="lora", lora_rank=4)
MERGED = UpdateConfig(what="lora", lora_rank=4, lora_sync="merged")
UPDATES = {
    "layer": UpdateConfig(what="partial", names=["model.layers.1.*"]),
    "head": UpdateConfig(what="partial", names=["lm_head.weight"]),
    "adapters": ADAPTERS,
    "merged": MERGED,
}


def trained_policy(folder, update):
    """The folder's model with what `update` trains moved at random."""
    policy = load_policy(ModelConfig(path=str(folder)), CPU, update=update)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def sent(policy, wire_dtype=None):
    """(manifest, tensors) as a receiver has them, the manifest after its way through a dict."""
    source = policy.sync_source()
    buffer = SnapshotBuffer(source.named, 4096, wire_dtype, adapted=source.adapted, patch=source.patch)
    buffer.snapshot()
    manifest = from_plain(WeightManifest, to_plain(buffer.manifest(1)))
    return manifest, list(tensor_views(manifest.layout, buffer.flat))


def completed(base, manifest, received):
    pairs = list(base.complete(manifest, received))
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names)
    assert set(names) == complete_names(manifest)
    return dict(pairs)


@pytest.fixture
def folder(tied_model_dir, tmp_path):
    """A copy of the tied model's folder, to be damaged."""
    return shutil.copytree(tied_model_dir, tmp_path / "model")


def rewrite(folder, change):
    """Stores what `change` makes of the stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(UPDATES))
def test_base_and_what_was_sent_make_the_learners_weights_bit_for_bit(name, tied, tied_model_dir, untied_model_dir):
    folder = tied_model_dir if tied else untied_model_dir
    policy = trained_policy(folder, UPDATES[name])
    manifest, received = sent(policy)
    base = BaseWeights(str(folder), CPU)
    base.prepare(manifest)
    whole = completed(base, manifest, received)
    expected = merged_state(policy.model)
    assert set(whole) == set(expected)
    for tensor_name, tensor in expected.items():
        assert torch.equal(whole[tensor_name], tensor), tensor_name
    sizes = {tensor_name: tensor.nbytes for tensor_name, tensor in policy.named_sync_parameters()}
    assert base.num_bytes == sum(sizes[tensor_name] for tensor_name, _ in manifest.patch.base)


def test_adapters_that_travel_in_bfloat16_are_folded_in_float32(tied_model_dir):
    policy = trained_policy(tied_model_dir, ADAPTERS)
    manifest, received = sent(policy, torch.bfloat16)
    base = BaseWeights(str(tied_model_dir), CPU)
    base.prepare(manifest)
    weight = completed(base, manifest, received)[f"{Q1}.weight"]
    trained = policy.trained_tensors()
    a, b = (trained[f"{Q1}.lora_{half}.weight"].bfloat16() for half in "AB")
    initial = load_file(tied_model_dir / "model.safetensors")[f"{Q1}.weight"]
    assert torch.equal(weight, fold_adapter(initial, a, b, 8.0))
    assert_near(weight, initial.double() + 8.0 * b.double() @ a.double(), steps=16)


def test_a_complete_manifest_needs_no_base_and_drops_the_one_there_was(tied_model_dir):
    base = BaseWeights(str(tied_model_dir), CPU)
    base.prepare(sent(trained_policy(tied_model_dir, ADAPTERS))[0])
    assert base.num_bytes > 0
    manifest, received = sent(trained_policy(tied_model_dir, UpdateConfig()))
    base.prepare(manifest)
    assert base.num_bytes == 0
    assert [name for name, _ in base.complete(manifest, received)] == [name for name, _ in received]
    nowhere = BaseWeights("/nowhere", CPU)
    nowhere.prepare(manifest)
    with pytest.raises(ModelError, match="no such folder"):
        nowhere.prepare(sent(trained_policy(tied_model_dir, ADAPTERS))[0])


def test_the_folder_is_read_once_and_again_when_something_else_stays(folder):
    policy = trained_policy(folder, ADAPTERS)
    manifest, received = sent(policy)
    other, _ = sent(trained_policy(folder, UPDATES["layer"]))
    base = BaseWeights(str(folder), CPU)
    base.prepare(manifest)
    before = {name: tensor.clone() for name, tensor in completed(base, manifest, received).items()}
    changed = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    content = save(changed, metadata={"format": "pt"})
    with (folder / "model.safetensors").open("r+b") as file:  # in place, as rsync --inplace does
        file.write(content)
    base.prepare(manifest)
    after = completed(base, manifest, received)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ModelError, match="other values"):
        base.prepare(other)
    assert base.num_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_in_the_folder_does_not_matter_and_is_the_one_held(folder, dtype):
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    policy = trained_policy(folder, ADAPTERS)
    manifest, received = sent(policy)
    base = BaseWeights(str(folder), CPU)
    base.prepare(manifest)
    whole = completed(base, manifest, received)
    for name, tensor in merged_state(policy.model).items():
        assert torch.equal(whole[name].float(), tensor)
    assert whole["model.norm.weight"].dtype == dtype


def test_what_the_folder_holds_besides_is_left_alone(folder):
    """Some tied models store their head too, some store buffers."""

    def add(tensors):
        head = torch.full_like(tensors["model.embed_tokens.weight"], 7.0)
        return tensors | {"lm_head.weight": head, "model.rotary_emb.inv_freq": torch.ones(4)}

    clean = trained_policy(folder, ADAPTERS)
    manifest, received = sent(clean)
    rewrite(folder, add)
    base = BaseWeights(str(folder), CPU)
    base.prepare(manifest)
    whole = completed(base, manifest, received)
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])
    assert "model.rotary_emb.inv_freq" not in whole


def test_a_folder_of_several_files_is_read_as_one(folder, tied_model_dir):
    from transformers import AutoModelForCausalLM

    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    policy = trained_policy(tied_model_dir, ADAPTERS)
    manifest, received = sent(policy)
    base = BaseWeights(str(folder), CPU)
    base.prepare(manifest)
    whole = completed(base, manifest, received)
    assert all(torch.equal(whole[name], tensor) for name, tensor in merged_state(policy.model).items())


def change_layout(manifest, tensor_name, **changes):
    entries = tuple(
        entry._replace(**changes) if entry.name == tensor_name else entry for entry in manifest.layout.tensors
    )
    return dataclasses.replace(manifest, layout=dataclasses.replace(manifest.layout, tensors=entries))


@pytest.mark.parametrize(
    ("update", "change", "message"),
    [
        ("layer", {"shape": (64, 32)}, rf"sends {Q1}.weight as \(64, 32\), the model has \(64, 64\)"),
        ("layer", {"name": "model.layers.7.weight"}, "the model has no tensor model.layers.7.weight"),
        ("merged", {"shape": (32, 64)}, rf"sends {Q1}.weight as \(32, 64\)"),
    ],
)
def test_a_tensor_that_has_no_place_in_the_model_is_refused_by_name(tied_model_dir, update, change, message):
    manifest, _ = sent(trained_policy(tied_model_dir, UPDATES[update]))
    with pytest.raises(ProtocolError, match=message):
        BaseWeights(str(tied_model_dir), CPU).prepare(change_layout(manifest, f"{Q1}.weight", **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4, 32)}, rf"{Q1}.weight is \(64, 64\), its adapter \(64, 4\) times \(4, 32\)"),
        ({"shape": (2, 64)}, r"times \(2, 64\)"),
        ({"shape": (256,)}, r"times \(256,\)"),
        ({"name": "model.layers.0.x.lora_A.weight"}, "model.layers.0.x.weight has an adapter and is not among"),
        ({"name": "model.layers.0.x.weight"}, f"comes without {Q1}.lora_A.weight"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tied_model_dir, change, message):
    manifest, _ = sent(trained_policy(tied_model_dir, ADAPTERS))
    with pytest.raises(ProtocolError, match=message):
        BaseWeights(str(tied_model_dir), CPU).prepare(change_layout(manifest, f"{Q1}.lora_A.weight", **change))


def test_a_tie_to_nothing_is_refused(tied_model_dir):
    manifest, _ = sent(trained_policy(tied_model_dir, ADAPTERS))
    patch = dataclasses.replace(manifest.patch, tied=(("lm_head.weight", "model.embed.weight"),))
    with pytest.raises(ProtocolError, match="lm_head.weight is tied to model.embed.weight"):
        BaseWeights(str(tied_model_dir), CPU).prepare(dataclasses.replace(manifest, patch=patch))


def test_a_folder_that_lacks_a_frozen_tensor_or_has_another_one_is_refused_by_name(folder):
    manifest, _ = sent(trained_policy(folder, ADAPTERS))
    norm = "model.norm.weight"
    rewrite(folder, lambda tensors: tensors | {norm: tensors[norm] + 1e-6})
    with pytest.raises(ModelError, match=r"model.norm.weight has other values .* copy the learner's model folder"):
        BaseWeights(str(folder), CPU).prepare(manifest)
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != norm})
    with pytest.raises(ModelError, match="lacks 1 tensors that the learner does not send, model.norm.weight first"):
        BaseWeights(str(folder), CPU).prepare(manifest)
    (folder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read"):
        BaseWeights(str(folder), CPU).prepare(manifest)

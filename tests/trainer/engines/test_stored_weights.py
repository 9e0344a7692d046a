"""Weights that stay in their files until a rank reads its rows: the same bits as a model that is loaded whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from asyncrl.config import Config
from asyncrl.errors import ModelError
from asyncrl.host.model_folder import find_model
from asyncrl.trainer.critic import load_critic
from asyncrl.trainer.engines import stored_weights
from asyncrl.trainer.engines.fsdp import fsdp_engines_for, load_fsdp_engines
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.engines.policy import load_policy
from asyncrl.trainer.engines.stored_weights import stored_model
from asyncrl.trainer.world import World
from tests.trainer.ranks.loading_cases import CASES, CPU, config_of, save_model, tensors_of

pytestmark = pytest.mark.bits


def whole(config: Config):
    """Engines as they are where every rank loads the whole model."""
    policy = load_policy(config.model, CPU, update=config.update, seed=config.run.seed)
    return fsdp_engines_for(policy, config, CPU, World.alone(), critic=load_critic(config, policy))


@pytest.mark.parametrize("name", CASES)
def test_all_tensors_and_scores_are_those_of_a_model_loaded_whole(name, tmp_path):
    config = config_of(name, save_model(name, tmp_path / "model"))
    torch.manual_seed(0)
    expected = whole(config)
    drawn = torch.random.get_rng_state()
    torch.manual_seed(0)
    engines = load_fsdp_engines(config, CPU, World.alone())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert (engines.actor.policy.weights is None) == CASES[name].is_whole
    mine, theirs = tensors_of(engines), tensors_of(expected)
    assert list(mine) == list(theirs)
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(local(tensor), local(theirs[key])), key
    assert engines.actor.identity() == expected.actor.identity()
    assert engines.actor.tensors().patch == expected.actor.tensors().patch
    assert engines.actor.prefers_shared_rows == expected.actor.prefers_shared_rows
    sequences = [torch.arange(2, 9).numpy(), torch.arange(5, 1, -1).numpy()]
    for one, other in zip(engines.actor.score(sequences), expected.actor.score(sequences), strict=True):
        assert (one == other).all()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def wrong_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(17)


BROKEN: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "missing": lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
    "of another shape": wrong_shape,
    "both ends of the tie missing": lambda tensors: tensors.pop("model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_without_a_fitting_tensor_are_refused_as_a_whole_model_is(name, tmp_path):
    config = config_of("tied", edit(save_model("tied", tmp_path / "model"), BROKEN[name]))
    with pytest.raises(ModelError) as expected:
        whole(config)
    with pytest.raises(ModelError) as found:
        load_fsdp_engines(config, CPU, World.alone())
    assert str(found.value) == str(expected.value)


def test_a_tensor_too_many_is_left_out(tmp_path):
    folder = edit(save_model("tied", tmp_path / "model"), lambda tensors: tensors.update(surplus=torch.ones(3)))
    engines = load_fsdp_engines(config_of("tied", folder), CPU, World.alone())
    assert engines.actor.policy.weights is not None


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    folder = save_model("tied", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.path=.* cannot be loaded: .*model\.safetensors ends too early"):
        load_fsdp_engines(config_of("tied", folder), CPU, World.alone())


def test_a_parameter_that_nothing_fills_is_no_memory_that_nobody_wrote(tmp_path, monkeypatch):
    folder = save_model("tied", tmp_path / "model")
    sources = stored_weights._sources

    def forgetful(*arguments):
        found = sources(*arguments)
        del found["model.norm.weight"]
        return found

    monkeypatch.setattr(stored_weights, "_sources", forgetful)
    assert stored_model(AutoModelForCausalLM, find_model(str(folder)), "it") is None
    with pytest.raises(AssertionError, match="without memory"):
        monkeypatch.undo()
        other = stored_model(AutoModelForCausalLM, find_model(str(folder)), "it")
        assert other is not None
        monkeypatch.setattr(other[0], "load_state_dict", lambda *_, **__: None)
        other[1].fill(other[0], CPU)


def test_why_a_model_is_loaded_whole_is_told(tmp_path, caplog):
    folder = save_model("untied", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with caplog.at_level(logging.INFO, logger=stored_weights.__name__):
        assert stored_model(AutoModelForCausalLM, find_model(str(folder)), "model.path=it") is None
    assert "model.path=it is loaded whole on every rank: its configuration ties lm_head.weight" in caplog.text


def test_buffers_are_computed(tmp_path):
    folder = save_model("tied", tmp_path / "model")
    found = stored_model(AutoModel, find_model(str(folder)), "it")
    assert found is not None
    expected = dict(AutoModel.from_pretrained(folder).named_buffers())
    assert expected
    for name, buffer in found[0].named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_a_buffer_that_nothing_computes_is_seen(tmp_path, monkeypatch, caplog):
    from transformers import PreTrainedModel

    folder = save_model("tied", tmp_path / "model")
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda *_: None)
    with caplog.at_level(logging.INFO, logger=stored_weights.__name__):
        assert stored_model(AutoModel, find_model(str(folder)), "it") is None
    assert "the buffer rotary_emb.inv_freq is not computed" in caplog.text

"""Models and methods whose loading slice by slice must give what loading them whole gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from asyncrl.config import Config, ModelConfig, UpdateConfig
from asyncrl.trainer.engines.base import Engines
from tests.trainer.tiny import VOCAB, save_tiny_model, tiny_model

CPU = torch.device("cpu")
LORA = UpdateConfig(what="lora", lora_rank=4)
PARTIAL = UpdateConfig(what="partial", names=["model.layers.1.*"])


@dataclass(frozen=True)
class LoadingCase:
    """A model folder and a configuration. Its vocabulary of 23 divides by no number of ranks."""

    folder: str = "tied"  # how it is made, see `save_model`
    dtype: str = "float32"  # model.dtype
    update: UpdateConfig = field(default_factory=UpdateConfig)
    kl_coef: float = 0.05
    critic: str = ""  # "own", "shared"
    is_whole: bool = False  # it cannot be read slice by slice


CASES = {
    "tied": LoadingCase(),
    "untied": LoadingCase("untied"),
    "head stored twice": LoadingCase("twice"),
    "two kinds of files": LoadingCase("both", is_whole=True),
    "bfloat16 files": LoadingCase("bfloat16"),
    "float16 files": LoadingCase("float16", "bfloat16"),
    "several files": LoadingCase("several"),
    "of the trunk alone": LoadingCase("trunk"),
    "bfloat16 passes": LoadingCase(dtype="bfloat16"),
    "lora": LoadingCase(update=LORA),
    "lora in bfloat16": LoadingCase("bfloat16", "bfloat16", LORA),
    "lora on an untied head's model": LoadingCase("untied", update=LORA),
    "partial": LoadingCase(update=PARTIAL),
    "partial in bfloat16": LoadingCase("untied", "bfloat16", PARTIAL),
    "own critic": LoadingCase(critic="own", kl_coef=0.0),
    "shared critic": LoadingCase(critic="shared"),
    "experts": LoadingCase("experts"),
    "experts, partial": LoadingCase("experts", "bfloat16", UpdateConfig(what="partial", names=["model.norm.weight"])),
}


def save_model(name: str, folder: Path) -> Path:
    """The folder of the case, or of this kind."""
    kind = CASES[name].folder if name in CASES else name
    save_tiny_model(folder, tied=kind != "untied")
    file = folder / "model.safetensors"
    match kind:
        case "twice":
            tensors = load_file(file)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, file, metadata={"format": "pt"})
        case "bfloat16" | "float16":
            dtype = getattr(torch, kind)
            save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
        case "several":
            file.unlink()
            tiny_model().save_pretrained(folder, max_shard_size="10KB")
            assert len(list(folder.glob("*.safetensors"))) > 1
        case "both":
            index = {"weight_map": dict.fromkeys(load_file(file), file.name)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "trunk":
            tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        case "experts":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                _model_of_experts().save_pretrained(folder)
    return folder


def config_of(name: str, folder: Path) -> Config:
    case = CASES.get(name, LoadingCase())
    config = Config()
    config.model = ModelConfig(path=str(folder), dtype=case.dtype, max_length=64)
    config.update = case.update
    config.run.seed = 11
    config.algorithm.kl_coef = case.kl_coef
    if case.critic:
        config.algorithm.advantage, config.critic.trunk = "gae", case.critic
    return config


def tensors_of(engines: Engines) -> dict[str, Tensor]:
    """Every parameter and buffer that the engines hold, whoever trains it."""
    return dict(_tensors(engines))


def _tensors(engines: Engines) -> Iterator[tuple[str, Tensor]]:
    roots: list[tuple[str, Any]] = [("actor", engines.actor.root), ("reference", engines.actor._reference)]
    if engines.critic is not None:
        roots.append(("critic", engines.critic.root))
    for part, root in roots:
        if root is not None:
            yield from ((f"{part}.{name}", tensor.data) for name, tensor in root.named_parameters())
            yield from ((f"{part}.{name}", tensor) for name, tensor in root.named_buffers())


def _model_of_experts() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config)

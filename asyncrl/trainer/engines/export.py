"""The policy as a Hugging Face model folder, for use outside of asyncrl and as model.path of another run.

Weights are float32 where all of them are trained: these are the masters, and a checkpoint needs no second copy. Where
adapters or a part are trained, the whole model is written as the generators compute with it: merged, in model.dtype.
What was trained is beside it then, exactly: adapters in PEFT's format, a part by its names.

config.json, generation_config.json and the tokenizer are copied from the folder that the model was loaded from.
transformers' own save_pretrained would check them, and refuse to save what it had loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from asyncrl.storage.checkpoint_files import ADAPTER_FOLDER, STATE_FOLDER, write_folder_atomically
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.policy import Policy
from asyncrl.weights.bytes.patch import LORA_A

# Beside weights and config.json, what AutoTokenizer and `vllm serve` look for.
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
)
GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9
PEFT_PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_WEIGHTS = "weights.safetensors"  # of a partial update; older checkpoints have it of every update


def export_model(policy: Policy, source: Path | None, folder: Path) -> None:
    """Writes the policy in Hugging Face format, with tokenizer, for AutoModelForCausalLM and `vllm serve`.

    Adapters are merged into their weights. Files besides the weights come from `source`, a model folder; where that is
    None or no folder, from where the policy was loaded. An existing folder is replaced as a whole.

    Raises CheckpointError when the folder cannot be written.
    """
    write_folder_atomically(folder, lambda target: write_model(policy, source, target))


def write_model(policy: Policy, source: Path | None, folder: Path) -> None:
    """Puts the policy as a Hugging Face model into an existing folder; see `export_model`."""
    source = source if source is not None and source.is_dir() else policy.source
    dtype = torch.float32 if policy.update.what == "full" else getattr(torch, policy.dtype)
    _write_weights(_model_state(policy.model, dtype), folder)
    _write_config(policy.model, source, dtype, folder)
    if source is None:
        return
    for pattern in TOKENIZER_PATTERNS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_trained(policy: Policy, folder: Path) -> None:
    """Puts what is trained into a checkpoint's folder that `write_model` was given before, unless that is all of it."""
    if policy.update.what == "lora":
        (folder / ADAPTER_FOLDER).mkdir()
        write_adapter(policy, folder / ADAPTER_FOLDER)
    elif policy.update.what == "partial":
        (folder / STATE_FOLDER).mkdir(exist_ok=True)
        save_file(policy.checkpoint_tensors(), folder / STATE_FOLDER / TRAINED_WEIGHTS)


def read_trained(policy: Policy, folder: Path) -> dict[str, Tensor]:
    """What training had changed of the policy, by the names of `Policy.checkpoint_tensors`, from a checkpoint's folder.

    Raises OSError, ValueError, RuntimeError or SafetensorError when a file cannot be read.
    """
    for file in (folder / STATE_FOLDER / TRAINED_WEIGHTS, folder / TRAINED_WEIGHTS):
        if file.is_file():
            return load_file(file)
    if (adapter := folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS).is_file():
        return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(adapter).items()}
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(file)
    own = policy.checkpoint_tensors()
    if weights.keys() == own.keys():
        return weights
    # In memory this kind of model has other tensors than in files (experts are stacked): transformers converts them.
    model = type(policy.model).from_pretrained(folder, dtype=torch.float32)
    state: dict[str, Tensor] = model.state_dict()
    return {name: state[name] for name in own if name in state}


def write_adapter(policy: Policy, folder: Path) -> None:
    """Puts the adapters alone into an existing folder, as PEFT writes and loads them."""
    tensors = policy.trained_tensors()
    layers = sorted({name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)})
    assert len(tensors) == 2 * len(layers), "an adapter is A and B of a layer, and nothing else is trained"
    save_file(
        {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    alpha = policy.update.lora_alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if policy.source is None else str(policy.source.resolve()),
        "r": policy.update.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", settings)


def _model_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under their names in a Hugging Face checkpoint, a tied one once, with adapters merged."""
    tied = model.all_tied_weights_keys or {}
    state = {name: tensor for name, tensor in merged_state(model, dtype).items() if name not in tied}
    # Tensors that are one by another way than a tie (safetensors takes no tensor twice).
    state = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, state))


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    """One file, or several with an index that says which tensor is in which, as transformers names them."""
    shards = _shards(state)
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        save_file({name: state[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(state: dict[str, Tensor]) -> list[list[str]]:
    """The names in their order, cut before MAX_SHARD_BYTES would be exceeded; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if shards[-1] and filled + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_config(model: PreTrainedModel, source: Path | None, dtype: torch.dtype, folder: Path) -> None:
    given = source / "config.json" if source is not None else None
    if given is not None and given.is_file():
        config = json.loads(given.read_text(encoding="utf-8"))
    else:
        config = model.config.to_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    _write_json(folder / "config.json", config)
    if source is not None and (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    elif model.generation_config is not None:
        model.generation_config.to_json_file(folder / GENERATION_CONFIG)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The policy as a Hugging Face model folder, for use outside of asyncrl and as model.path of another run.

An export is in model.dtype, as the generators compute with it, adapters merged. So is the model in a checkpoint where
adapters or a part are trained; what was trained is beside it then, exactly: adapters in PEFT's format, a part by its
names. Where all weights are trained, a checkpoint's are float32: these are the masters, and it needs no second copy.

Tensors are put together, converted and written one at a time.

config.json, generation_config.json and the tokenizer are copied from the folder that the model was loaded from.
transformers' own save_pretrained would check them, and refuse to save what it had loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from asyncrl.storage.checkpoint_files import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    LORA_A,
    PEFT_PREFIX,
    STATE_FOLDER,
    WEIGHT_SHARDS,
    write_folder_atomically,
)
from asyncrl.storage.model_files import write_json, write_model_files
from asyncrl.storage.tensor_files import ITEM_BYTES, SUFFIX, Buffer, Content, FileProof, write_tensors
from asyncrl.trainer.engines.lora import adapted_weights, is_adapter, plain_name
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.shards import DTYPES, TensorFiles, bytes_of, check_shapes, cut, extent_of, read_blocks
from asyncrl.weights.bytes.patch import fold_adapter

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
TRAINED_WEIGHTS = "weights.safetensors"  # of a partial update; older checkpoints have it of every update


def export_model(policy: Policy, source: Path | None, folder: Path, *, rank: int = 0) -> None:
    """Writes the policy in Hugging Face format and in its dtype, for AutoModelForCausalLM and `vllm serve`.

    Adapters are merged into their weights. Files besides the weights come from `source`, a model folder; where that is
    None or no folder, from where the policy was loaded. An existing folder is replaced as a whole. Of a model in shards
    one tensor at a time is put together: all ranks call this, rank 0 writes.

    Raises CheckpointError when the folder cannot be written.
    """
    contents = InTurn(_model_contents(policy, getattr(torch, policy.dtype), {}))
    try:
        if rank == 0:

            def write_files(target: Path) -> None:
                _write_model(policy, source, target, contents.listed)

            write_folder_atomically(folder, write_files)
    finally:
        contents.read_rest()  # other ranks wait in their part of it, whatever became of the file


def write_model(policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None) -> dict[str, FileProof]:
    """Puts the policy as a Hugging Face model into a checkpoint's folder, and what is trained of it beside that.

    weights  copies on the CPU of `Policy.checkpoint_tensors`, which are written instead of those; None: no weights

    May run beside training: of the policy itself only what is frozen is read. Returns size and digest of the weights'
    files by name. Raises OSError.
    """
    # Masters where all of them are trained, so that a checkpoint needs no second copy.
    dtype = torch.float32 if policy.update.what == "full" else getattr(torch, policy.dtype)
    if policy.update.what == "lora":
        _write_adapter_config(policy, folder / ADAPTER_FOLDER)
    if weights is None:
        _write_rest(policy, None, dtype, folder)
        return {}
    proofs = _write_model(policy, None, folder, _model_contents(policy, dtype, weights), dtype)
    if policy.update.what == "lora":
        file = f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"
        halves = [_content(f"{PEFT_PREFIX}{name}", half) for name, half in weights.items()]
        proofs[file] = write_tensors(folder / file, halves)
    elif policy.update.what == "partial":
        (folder / STATE_FOLDER).mkdir(exist_ok=True)
        file = f"{STATE_FOLDER}/{TRAINED_WEIGHTS}"
        proofs[file] = write_tensors(folder / file, [_content(name, value) for name, value in weights.items()])
    return proofs


def read_trained(policy: Policy, folder: Path) -> dict[str, Tensor]:
    """What training had changed of the policy, by the names of `Policy.checkpoint_tensors`: this rank's blocks of it.

    Raises CheckpointError when it does not fit, and OSError, ValueError, RuntimeError or SafetensorError when a file
    cannot be read.
    """
    own = policy.checkpoint_tensors()
    if shards := sorted((folder / STATE_FOLDER / WEIGHT_SHARDS).glob(f"*{SUFFIX}")):
        return read_blocks(TensorFiles(shards), own, folder)
    for file in (folder / STATE_FOLDER / TRAINED_WEIGHTS, folder / TRAINED_WEIGHTS):
        if file.is_file():
            return read_blocks(TensorFiles([file]), own, file)
    if (adapter := folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS).is_file():
        return read_blocks(TensorFiles([adapter], PEFT_PREFIX), own, adapter)
    files = TensorFiles(sorted(folder.glob(f"model*{SUFFIX}")))
    if files.shapes.keys() == own.keys():
        return read_blocks(files, own, folder)
    # In memory this kind of model has other tensors than in files (experts are stacked): transformers converts them.
    model = type(policy.model).from_pretrained(folder, dtype=torch.float32)
    state: dict[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, own)
    return {name: cut(state[name], extent_of(tensor)) for name, tensor in own.items()}


def _write_adapter_config(policy: Policy, folder: Path) -> None:
    """Makes the folder of the adapters as PEFT loads them, all but their weights."""
    folder.mkdir()
    names = policy.trained_parameters()
    layers = sorted({name.removesuffix(LORA_A) for name in names if name.endswith(LORA_A)})
    assert len(names) == 2 * len(layers), "an adapter is A and B of a layer, and nothing else is trained"
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
    write_json(folder / "adapter_config.json", settings)


class InTurn:
    """Contents whose reading is a collective of all ranks, in the order in which they are listed."""

    def __init__(self, contents: Sequence[Content]) -> None:
        self._waiting = list(contents)
        self.listed = [replace(content, read=partial(self._read, content)) for content in contents]

    def read_rest(self) -> None:
        """Takes part in the reading of what was not read yet."""
        while self._waiting:
            self._waiting.pop(0).read()

    def _read(self, content: Content) -> Buffer:
        assert self._waiting[0] is content, f"{content.name} is read out of turn"
        self._waiting.pop(0)
        return content.read()


def _model_contents(policy: Policy, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> list[Content]:
    """The weights under their names in a Hugging Face checkpoint, a tied one once, with adapters merged.

    Each is put together when it is read, on the CPU: neither a second model nor one in float32 is ever in memory.
    `weights` are copies that stand for tensors of the policy, by the names of `Policy.checkpoint_tensors`.
    """
    model = policy.model
    # By where they are, not by name: a tensor that two places share has one name there and may have another one here.
    copies = {
        local(own).data_ptr(): weights[name] for name, own in policy.checkpoint_tensors().items() if name in weights
    }
    adapted = adapted_weights(model)
    tied = model.all_tied_weights_keys or {}
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if name not in tied and not is_adapter(name)}
    # Tensors that are one by another way than a tie (safetensors takes no tensor twice).
    state = remove_tied_weights_from_state_dict(state, model)

    def current(tensor: Tensor) -> Tensor:
        return copies[place] if (place := local(tensor).data_ptr()) in copies else whole_on_cpu(tensor)

    def value(name: str) -> Tensor:
        tensor = current(state[name])
        if name in adapted:
            halves = adapted[name]
            tensor = fold_adapter(tensor, current(halves.lora_a), current(halves.lora_b), halves.scale)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    kinds = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    shapes = {name: torch.empty(tensor.shape, dtype=kinds[name], device="meta") for name, tensor in state.items()}
    stored = dict(revert_weight_conversion(model, shapes))
    if {name: tensor.shape for name, tensor in stored.items()} != {name: value.shape for name, value in shapes.items()}:
        # In files this kind of model has other tensors than in memory (experts one by one): transformers divides them.
        whole = revert_weight_conversion(model, {name: value(name) for name in state})
        return _in_order(_content(name, tensor) for name, tensor in whole.items())
    return _in_order(
        Content(name, DTYPES[kinds[name]], tuple(tensor.shape), partial(_bytes_of_value, value, name))
        for name, tensor in state.items()
    )


def _bytes_of_value(value: Callable[[str], Tensor], name: str) -> Buffer:
    return bytes_of(value(name))()


def _in_order(contents: Iterable[Content]) -> list[Content]:
    """As `write_tensors` takes them, wide elements first, so that they are read in the order of this list."""
    return sorted(contents, key=lambda content: -ITEM_BYTES[content.dtype])


def whole_on_cpu(tensor: Tensor) -> Tensor:
    """All of a tensor on the CPU. Of a DTensor this is a collective of its ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _content(name: str, tensor: Tensor) -> Content:
    return Content(name, DTYPES[tensor.dtype], tuple(tensor.shape), bytes_of(tensor))


def _write_model(
    policy: Policy, source: Path | None, folder: Path, contents: Sequence[Content], dtype: torch.dtype | None = None
) -> dict[str, FileProof]:
    _write_rest(policy, source, dtype or getattr(torch, policy.dtype), folder)
    return write_model_files(contents, folder)


def _write_rest(policy: Policy, source: Path | None, dtype: torch.dtype, folder: Path) -> None:
    """All files of a model but the weights."""
    source = source if source is not None and source.is_dir() else policy.source
    _write_config(policy.model, source, dtype, folder)
    if source is None:
        return
    for pattern in TOKENIZER_PATTERNS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_config(model: PreTrainedModel, source: Path | None, dtype: torch.dtype, folder: Path) -> None:
    given = source / "config.json" if source is not None else None
    if given is not None and given.is_file():
        config = json.loads(given.read_text(encoding="utf-8"))
    else:
        config = model.config.to_dict()
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    write_json(folder / "config.json", config)
    if source is not None and (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    elif model.generation_config is not None:
        model.generation_config.to_json_file(folder / GENERATION_CONFIG)

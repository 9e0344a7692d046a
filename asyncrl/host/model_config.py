"""config.json of a model folder: the one reader, what it refuses by name, and the sizes that are read from it.

Only text models with a plain head are trained. Whatever is none is refused here, before anything is started, and so is
a file that does not say what every process needs to know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from asyncrl.errors import ModelError

# What a config.json calls the length that its positions reach to, as vLLM looks it up.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Kinds of rotary scaling whose factor is part of max_position_embeddings already.
SCALED_ALREADY = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
ASK_TIMEOUT_S = 60.0
_ASK = """
import sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
config = CONFIG_MAPPING[sys.argv[1]]()
print(next((value for name in sys.argv[2:] if isinstance(value := getattr(config, name, None), int)), 0))
"""


def read_model_config(folder: Path, key: str) -> dict[str, Any]:
    """The parsed config.json of `folder`, for a model that can be trained; `key` is what messages call the folder.

    Raises ModelError when the file is missing or damaged, has no `vocab_size`, or is of a model with other inputs than
    text, of an encoder and a decoder, or of quantized weights.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{key} has no config.json: it is not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: config.json cannot be read ({error}); copy the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{key}: config.json must be an object with the model's settings; copy the model again")
    if problem := _problem(config):
        raise ModelError(f"{key}: {problem}")
    return config


def check_generation_config(folder: Path, key: str) -> None:
    """Raises ModelError where generation_config.json is there and no engine could take the end tokens from it.

    What it says of sampling is nobody's business here: sampling is configured, and the file is exported as it is.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {path.name} cannot be read ({error}); copy it again, or remove it") from None
    ends = content.get("eos_token_id") if isinstance(content, dict) else "none"
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in listed):
        raise ModelError(f"{key}: {path.name} must be an object whose eos_token_id is a number or a list of numbers")


def vocab_size(config: dict[str, Any]) -> int:
    """Rows of the embedding: token ids are below it."""
    return int(config["vocab_size"])


def size_of(config: dict[str, Any], name: str) -> int:
    """A size from config.json; 0 when it is not there, or is no whole number."""
    value = config.get(name)
    return value if isinstance(value, int) and _is_size(value) else 0


def heads_of(config: dict[str, Any]) -> tuple[int, int] | None:
    """Heads of queries and of keys in each layer; None when config.json does not say."""
    heads = size_of(config, "num_attention_heads") or size_of(config, "n_head")
    return (heads, size_of(config, "num_key_value_heads") or heads) if heads else None


def heads_problem(query_heads: int, key_heads: int, ranks: int) -> str | None:
    """Why the heads of a layer cannot be dealt to ranks; None where they can."""
    if query_heads % ranks == 0 and (key_heads % ranks == 0 or ranks % key_heads == 0):
        return None
    return (
        f"{query_heads} heads of queries and {key_heads} of keys cannot be dealt to {ranks} ranks: their number "
        "must divide the first, and divide the second or be divided by it; let fewer ranks share a sequence"
    )


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens that the model's positions reach to, rotary scaling counted in; None when config.json does not say."""
    sizes = [size for name in CONTEXT_KEYS if (size := size_of(config, name))]
    if not sizes:
        return None
    longest = size_of(config, "model_max_length") or min(sizes)
    return int(longest * _rope_factor(config))


def known_context(config: dict[str, Any]) -> int | None:
    """Tokens that the model reads at most: what config.json says, else what its kind of model has; None if unknown."""
    return context_length(config) or _default_context(config)


def _default_context(config: dict[str, Any]) -> int | None:
    """The context that transformers takes for this kind of model where config.json names none; None if it has none.

    Asked of a process of its own, which takes seconds: transformers would bring torch along.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    command = [sys.executable, "-c", _ASK, model_type, *CONTEXT_KEYS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    answer = done.stdout.strip()
    if done.returncode or not answer.isdecimal():
        return None
    return int(int(answer) * _rope_factor(config)) or None


def _problem(config: dict[str, Any]) -> str | None:
    name = _class_name(config)
    nested = [entry for entry, value in config.items() if isinstance(value, dict) and "vocab_size" in value]
    if nested or name.endswith("ForConditionalGeneration") or config.get("is_encoder_decoder"):
        place = f", whose text part is nested in {nested[0]} of config.json" if nested else ""
        return (
            f"{name} is a model with other parts than a text decoder{place}; only plain text models are trained. Give "
            "a folder of the text model alone, whose config.json has vocab_size and hidden_size at its top"
        )
    if not _is_size(config.get("vocab_size")):
        return f"config.json of {name} has no vocab_size (a whole number from 1); write it in, or copy the model again"
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        return (
            f"its weights are quantized (quantization_config: {method}), and training needs them in float32 or "
            "bfloat16; give a folder of the model without quantization"
        )
    return None


def _class_name(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return f"the model (model_type {config.get('model_type', 'unknown')})"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rope_factor(config: dict[str, Any]) -> float:
    """By how much rotary scaling lengthens the context that config.json names."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict) or "gemma3" in str(config.get("model_type")):
        return 1.0
    # One set of parameters, or one for each type of layer.
    per_layer = [value for value in scaling.values() if isinstance(value, dict)] or [scaling]
    factor = 1.0
    for parameters in per_layer:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        value = parameters.get("factor")
        if kind not in SCALED_ALREADY and isinstance(value, (int, float)) and value > 0:
            factor = float(value)
    return factor

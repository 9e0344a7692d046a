"""Whether a model's attention is known to be full: each token sees all before it, whatever lies between them.

Only then may completions share their prompt in one row. There a completion's tokens are not neighbours of the prompt,
and whatever counts places in the row instead of positions (a sliding window, chunks, ALiBi) would see another text.
"""

from __future__ import annotations

from typing import Any

# Families in transformers that attend in full but for the keys below, and that take their positions as given: each was
# compared, plain rows against shared ones. Any other family has plain rows, which are slower and always right.
FULL_ATTENTION_FAMILIES = frozenset(
    {
        "gemma", "glm", "glm4", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "phi3",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip

# Keys with these words limit whom a token sees, unless they are unset; these two do not.
LIMITING_WORDS = ("window", "chunk", "alibi", "local_attention", "attention_types", "block_size")
HARMLESS_KEYS = frozenset({"max_window_layers", "chunk_size_feed_forward"})


def is_full_attention(config: Any) -> bool:
    """Whether the model of a transformers configuration attends in full on every layer, as far as can be known."""
    if getattr(config, "model_type", None) not in FULL_ATTENTION_FAMILIES:
        return False
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    values = config.to_dict()
    limits = [key for key in values if key not in HARMLESS_KEYS and any(word in key for word in LIMITING_WORDS)]
    return not any(values[key] for key in limits)

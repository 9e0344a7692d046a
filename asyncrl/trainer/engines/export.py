"""The policy as a Hugging Face model folder, for use outside of asyncrl."""

from __future__ import annotations

import shutil
from pathlib import Path

from asyncrl.storage.checkpoint_files import write_folder_atomically
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.policy import Policy

# Beside weights and config.json, what AutoTokenizer and `vllm serve` look for.
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def export_model(policy: Policy, source: Path | None, folder: Path) -> None:
    """Writes the policy in Hugging Face format, with tokenizer, for AutoModelForCausalLM and `vllm serve`.

    Adapters are merged into their weights; weights stay float32. Tokenizer files come from `source`, a model folder;
    where that is None or no folder, from where the policy was loaded. An existing folder is replaced as a whole.

    Raises CheckpointError when the folder cannot be written.
    """

    def write_files(target: Path) -> None:
        policy.model.save_pretrained(target, state_dict=merged_state(policy.model))
        tokenizer_folder = source if source is not None and source.is_dir() else policy.source
        if tokenizer_folder is None:
            return
        for pattern in TOKENIZER_PATTERNS:
            for path in tokenizer_folder.glob(pattern):
                shutil.copyfile(path, target / path.name)

    write_folder_atomically(folder, write_files)

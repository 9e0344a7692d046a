"""Supervised steps for small models: what the warm-up of every task shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL_TOKENS = ("<pad>", "<end>", "<unknown>")
PAD_ID = 0
END_ID = 1
MAX_POSITIONS = 1024
IGNORED = -100  # label of positions without loss


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens named, as transformers and vLLM load it. Pads on the left."""
    pad, end, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown, padding_side="left"
    )


def make_model(
    vocab_size: int, hidden: int, layers: int, heads: int, inner: int, tied: bool, seed: int
) -> LlamaForCausalLM:
    """A new Llama model in float32; equal seeds give equal weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=END_ID,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class SupervisedTrainer:
    """AdamW on next-token cross entropy."""

    def __init__(self, model: LlamaForCausalLM, lr: float, warmup_steps: int) -> None:
        """warmup_steps: first steps, over which the learning rate rises linearly to lr."""
        self._model = model
        self._lr = lr
        self._warmup_steps = warmup_steps
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.steps = 0

    def step(self, sequences: Sequence[Sequence[int]], given: Sequence[int], lr_share: float = 1.0) -> float:
        """One optimizer step. Returns the loss in nats per token.

        sequences  token ids, each sequence with its completion
        given      how many leading tokens of each sequence carry no loss
        lr_share   scales the learning rate
        """
        ids, labels = _pad(sequences, given)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * lr_share * min(1.0, (self.steps + 1) / self._warmup_steps)
        self._model.train()
        logits = self._model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self.steps += 1
        return loss.item()


def _pad(sequences: Sequence[Sequence[int]], given: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [B, L], padded on the right: causal attention never sees padding there."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), PAD_ID)
    labels = torch.full((len(sequences), longest), IGNORED)
    for row, (sequence, start) in enumerate(zip(sequences, given, strict=True)):
        tokens = torch.tensor(sequence)
        ids[row, : len(tokens)] = tokens
        labels[row, start : len(tokens)] = tokens[start:]
    return ids, labels


@torch.no_grad()
def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """One completion of each prompt, as text; temperature 0 is greedy."""
    model.eval()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    # transformers declares `generate` for a protocol that its own models do not satisfy.
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, **sampling)  # type: ignore[misc]
    return tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model and tokenizer in Hugging Face format."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

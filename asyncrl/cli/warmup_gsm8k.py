"""The base model of the gsm8k task: a few million parameters, taught the form of a worked answer in a few minutes.

It is far too small to solve the problems. It learns to write sentences with sums in them and, most of the time, to end
with `#### number`; reinforcement learning can then raise the format part of the reward.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from asyncrl.cli.supervised import END_ID, SPECIAL_TOKENS, SupervisedTrainer, complete, make_model, save, wrap_tokenizer
from asyncrl.errors import ConfigError
from asyncrl.tasks.gsm8k import Gsm8k, prompt_text, read_records, worked_answer

VOCAB_SIZE = 2048
LR = 2e-3
MIN_LR_SHARE = 0.05
WARMUP_STEPS = 30
BATCH_TOKENS = 1024
MAX_TOKENS = 384  # longer examples are left out: a few in a hundred
BUCKET = 256  # examples sorted by length among themselves, so that little of a batch is padding
REPORT_EVERY_S = 30.0
PROBE_QUESTIONS = 64
PROBE_NEW_TOKENS = 160

Encoded = tuple[list[int], int]  # token ids of prompt and completion, length of the prompt


def make_gsm8k_model(folder: Path, data: str, eval_data: str, *, minutes: float, seed: int, threads: int) -> None:
    """Trains for `minutes` on the records of `data`, and writes the model to `folder`.

    Prints the loss, and at the end the shares of answers in the right form and of right answers. Raises ConfigError for
    minutes that are not above 0, TaskError when a file cannot be read.
    """
    if minutes <= 0:
        raise ConfigError(f"--minutes {minutes:g} must be above 0")
    torch.set_num_threads(threads)
    task = Gsm8k(data, eval_data)
    records = read_records(data)[: task.train_size]
    tokenizer = bpe_tokenizer(prompt_text(record["question"]) + worked_answer(record) for record in records)
    model = make_model(len(tokenizer), hidden=256, layers=4, heads=4, inner=640, tied=True, seed=seed)
    sequences = _encode(tokenizer, records)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
        f"{len(sequences)} examples of {sum(len(ids) for ids, _ in sequences) // len(sequences)} tokens on average",
        flush=True,
    )
    _train(SupervisedTrainer(model, LR, WARMUP_STEPS), sequences, minutes * 60.0, random.Random(seed))
    _report(model, tokenizer, task)
    save(model, tokenizer, folder)


def bpe_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts; digits are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def _encode(tokenizer: PreTrainedTokenizerFast, records: list[dict[str, str]]) -> list[Encoded]:
    prompts = tokenizer([prompt_text(record["question"]) for record in records])["input_ids"]
    completions = tokenizer([worked_answer(record) for record in records])["input_ids"]
    joined = [([*ids, *more, END_ID], len(ids)) for ids, more in zip(prompts, completions, strict=True)]
    return [(ids, given) for ids, given in joined if len(ids) <= MAX_TOKENS]


def _train(trainer: SupervisedTrainer, sequences: list[Encoded], seconds: float, generator: random.Random) -> None:
    """Steps until the time is up; the learning rate falls linearly with it."""
    started = reported = time.monotonic()
    losses: list[float] = []
    for batch in _batches(sequences, generator):
        spent = time.monotonic() - started
        if spent >= seconds:
            break
        # The loss is on the question too: half of what this model learns of language is in there.
        losses.append(trainer.step([ids for ids, _ in batch], [1] * len(batch), max(MIN_LR_SHARE, 1 - spent / seconds)))
        if time.monotonic() - reported >= REPORT_EVERY_S:
            reported = time.monotonic()
            print(f"step {trainer.steps}: loss {sum(losses) / len(losses):.3f}, {spent:.0f} s", flush=True)
            losses.clear()


def _batches(sequences: list[Encoded], generator: random.Random) -> Iterator[list[Encoded]]:
    """Batches of similar lengths, each of at most BATCH_TOKENS tokens with its padding, epoch after epoch."""
    while True:
        order = generator.sample(sequences, len(sequences))
        batches: list[list[Encoded]] = []
        for start in range(0, len(order), BUCKET):
            batch: list[Encoded] = []
            for sequence in sorted(order[start : start + BUCKET], key=lambda item: len(item[0])):
                if batch and (len(batch) + 1) * len(sequence[0]) > BATCH_TOKENS:
                    batches.append(batch)
                    batch = []
                batch.append(sequence)
            batches.append(batch)
        generator.shuffle(batches)
        yield from batches


def _report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Gsm8k) -> None:
    examples = task.eval_examples(PROBE_QUESTIONS)
    for name, temperature in (("greedy", 0.0), ("sampled at temperature 1", 1.0)):
        prompts = [str(example.prompt) for example in examples]
        completions = complete(model, tokenizer, prompts, PROBE_NEW_TOKENS, temperature)
        rewards = [task.reward(text, example.payload) for text, example in zip(completions, examples, strict=True)]
        shares = {part: sum(reward[part] > 0 for reward in rewards) / len(rewards) for part in ("format", "exact")}
        print(
            f"{len(examples)} held-out questions, {name}: format {shares['format']:.2f}, exact {shares['exact']:.2f}",
            flush=True,
        )
    print(f"an example: {examples[-1].prompt}{completions[-1]}", flush=True)

"""The base model of the arithmetic task: it has learned from careless work.

The examples are worked column by column, but most carries are lost on the way (`47+58=15,9=95`). The model learns to
work like that: it can carry, and seldom does. So it starts with a fifth to two fifths of the answers right, and with
the right way within reach of sampling: there reinforcement learning has something to do.
"""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.cli.supervised import END_ID, SPECIAL_TOKENS, SupervisedTrainer, complete, make_model, save, wrap_tokenizer
from asyncrl.tasks.arithmetic import CHARACTERS, Arithmetic, Problem, worked_answer

FORGET_SHARE = 0.7  # of carries, in the examples
BATCH = 32
LR = 3e-3
DECAY_STEPS = 400  # linear decay: it steadies the end, which must be hit within a window
MIN_LR_SHARE = 0.1
MAX_STEPS = 800
EVAL_FROM = 200  # steps
EVAL_EVERY = 25
EVAL_PROBLEMS = 256
WANTED_COHERENT = 0.9
MARGIN = 0.15  # largest accuracy above that of losing every carry; with more, carrying is a habit already


def make_arithmetic_model(folder: Path, digits: int, operations: str, *, seed: int, threads: int) -> None:
    """Trains a model of 0.8 million parameters until it works coherently, and writes it to `folder`.

    Its greedy held-out accuracy is then near that of losing every carry: 0.2 to 0.4 for sums of two digits.
    """
    torch.set_num_threads(threads)
    started = time.monotonic()
    task = Arithmetic(digits, operations)
    tokenizer = character_tokenizer()
    model = make_model(len(tokenizer), hidden=128, layers=4, heads=4, inner=384, tied=False, seed=seed)
    trainer = SupervisedTrainer(model, LR, warmup_steps=30)
    held_out = task.held_out_problems(EVAL_PROBLEMS)
    careless, _ = judge(held_out, [worked_answer(problem, forget=lambda: True) for problem in held_out])
    max_new_tokens = 4 * digits + 8
    generator = random.Random(seed)
    while trainer.steps < MAX_STEPS:
        loss = _step(trainer, tokenizer, task, generator)
        if trainer.steps < EVAL_FROM or trainer.steps % EVAL_EVERY:
            continue
        completions = complete(model, tokenizer, [problem.text for problem in held_out], max_new_tokens)
        accuracy, coherent = judge(held_out, completions)
        print(
            f"step {trainer.steps}: loss {loss:.3f}, held-out accuracy {accuracy:.3f}, right or carries lost "
            f"{coherent:.3f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if coherent >= WANTED_COHERENT and accuracy <= careless + MARGIN:
            break
    else:
        print(f"no coherent and careless model after {MAX_STEPS} steps; writing the model as it is", flush=True)
    save(model, tokenizer, folder)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the task."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrap_tokenizer(tokenizer)


def judge(problems: list[Problem], completions: list[str]) -> tuple[float, float]:
    """(share of right answers, share of answers that are right or wrong by lost carries alone)."""
    written = [completion.rpartition("=")[2] for completion in completions]
    right = [answer == str(problem.answer) for answer, problem in zip(written, problems, strict=True)]
    coherent = [answer in possible_answers(problem) for answer, problem in zip(written, problems, strict=True)]
    return sum(right) / len(problems), sum(coherent) / len(problems)


def possible_answers(problem: Problem) -> set[str]:
    """The right answer, and those that come out when any of the carries are lost."""
    carries = len(str(problem.left))
    answers = set()
    for lost in range(1 << carries):
        plan = iter([bool(lost >> place & 1) for place in range(carries)])
        answers.add(worked_answer(problem, forget=partial(next, plan)).rpartition("=")[2])
    return answers


def _step(
    trainer: SupervisedTrainer, tokenizer: PreTrainedTokenizerFast, task: Arithmetic, generator: random.Random
) -> float:
    problems = [task.train_problem(generator.randrange(task.train_size)) for _ in range(BATCH)]
    prompts = tokenizer([problem.text for problem in problems])["input_ids"]
    answers = [worked_answer(problem, lambda: generator.random() < FORGET_SHARE) for problem in problems]
    completions = tokenizer(answers)["input_ids"]
    sequences = [[*prompt, *completion, END_ID] for prompt, completion in zip(prompts, completions, strict=True)]
    lr_share = max(MIN_LR_SHARE, 1.0 - trainer.steps / DECAY_STEPS)
    return trainer.step(sequences, [len(prompt) for prompt in prompts], lr_share)

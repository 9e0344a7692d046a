"""Grade-school word problems (Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168).

Records are JSON Lines with `question` and `answer`, where the answer's last line is `#### 72`. The prompt is

    Question: Natalia sold clips to 48 of her friends ...
    Answer:

or, with `chat`, the question and a sentence on the form of the answer as one user message.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example, Messages
from asyncrl.tasks.shaping import has_form

CHAT_INSTRUCTION = "Reason step by step. Write the answer alone on the last line, in the form: #### 42"
MAX_HELD_OUT = 512

# 1,234.50 or 1234.50 or .5; a sign, before or after a $, counts unless it stands between two numbers (10-5).
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?<![\w.)])[-−]\$?|(?<![\w.)])\$-)?({_DIGITS})")
_FINAL_LINE = rf"(?:.*\n)?#### ?-?\$?-?(?:{_DIGITS})"
_CALCULATION = re.compile(r"<<[^>]*>>")


class Gsm8k:
    """Word problems. Parts of the reward: `exact`, for the right last number, and `format`, for a last line `#### 42`.

    path: a .json or .jsonl file, or the name of a Hugging Face data set (needs the package `datasets`).
    eval_path: held-out records; without it, a data set's test split, or the last tenth of the file (512 at most).
    exact_weight, format_weight: what the parts are worth. chat: prompts are chat messages.
    Data is read at the first example, so reward workers need none.
    """

    part_names = ("exact", "format")

    def __init__(
        self,
        path: str = "openai/gsm8k",
        eval_path: str = "",
        exact_weight: float = 1.0,
        format_weight: float = 0.2,
        chat: bool = False,
    ):
        self._path = path
        self._eval_path = eval_path
        self._exact_weight = exact_weight
        self._format_weight = format_weight
        self._chat = chat

    @property
    def train_size(self) -> int:
        """Records to train on; the first call reads the data."""
        return len(self._splits[0])

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`."""
        return self._example(self._splits[0][index])

    def eval_examples(self, count: int) -> list[Example]:
        """See `Task.eval_examples`."""
        return [self._example(record) for record in self._splits[1][:count]]

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """`exact` compares the completion's last number with the payload's answer, as decimal numbers."""
        exact = last_number(completion) == Decimal(payload["answer"])
        return {
            "exact": self._exact_weight * exact,
            "format": self._format_weight * has_form(completion, _FINAL_LINE),
        }

    @cached_property
    def _splits(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Training and held-out records."""
        if not _is_file_name(self._path):
            test = read_records(self._eval_path) if self._eval_path else _hub_records(self._path, "test")
            return _hub_records(self._path, "train"), test
        records = read_records(self._path)
        if self._eval_path:
            return records, read_records(self._eval_path)
        num_train = len(records) - min(MAX_HELD_OUT, len(records) // 10)
        return records[:num_train], records[num_train:]

    def _example(self, record: dict[str, str]) -> Example:
        answer = last_number(record["answer"])
        if answer is None:
            raise TaskError(f"a record of {self._path} has no number in its answer: {record['answer'][-80:]!r}")
        prompt: str | Messages = prompt_text(record["question"])
        if self._chat:
            prompt = [{"role": "user", "content": f"{record['question']}\n{CHAT_INSTRUCTION}"}]
        return Example(prompt, {"answer": str(answer)})


def prompt_text(question: str) -> str:
    """The plain prompt; the completion starts with a line end or a blank."""
    return f"Question: {question}\nAnswer:"


def worked_answer(record: dict[str, str]) -> str:
    """A record's own answer as a completion of `prompt_text`, without the calculator's marks (<<48/2=24>>)."""
    return "\n" + _CALCULATION.sub("", record["answer"])


def last_number(text: str) -> Decimal | None:
    """The last number in the text; commas between thousands and currency signs are no part of it."""
    number = None
    for number in _NUMBER.finditer(text):  # noqa: B007 - only the last is wanted
        pass
    if number is None:
        return None
    value = Decimal(number[2].replace(",", ""))
    return -value if number[1] else value


def read_records(path: str) -> list[dict[str, str]]:
    """Records of a JSON Lines file, each with `question` and `answer`. Raises TaskError naming file and line."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"{path} cannot be read ({error}); give a JSON Lines file with `question` and `answer`"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
            raise TaskError(f"{path}, line {number} must be an object with the texts `question` and `answer`")
        records.append(record)
    if not records:
        raise TaskError(f"{path} holds no records")
    return records


def _is_file_name(path: str) -> bool:
    return path.endswith((".json", ".jsonl")) or Path(path).expanduser().is_file()


def _hub_records(name: str, split: str) -> list[dict[str, str]]:
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"task.args.path={name} is not a .jsonl file, and reading a Hugging Face data set needs the package "
            f"`datasets`: pip install datasets, or give a file"
        ) from None
    try:
        return list(datasets.load_dataset(name, "main", split=split))
    except Exception as error:
        raise TaskError(
            f"data set {name!r}, split {split!r}, cannot be loaded ({type(error).__name__}: {error}); "
            f"give the path of a .jsonl file, or a data set with a configuration `main`"
        ) from error

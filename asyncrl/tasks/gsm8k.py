"""Grade-school word problems (Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168).

Records are JSON Lines with `question` and `answer`, where the answer's last line is `#### 72`. The prompt is

    Question: Natalia sold clips to 48 of her friends ...
    Answer:

or, with `chat`, the question and a sentence on the form of the answer as one user message.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import cached_property
from typing import Any

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example, Messages
from asyncrl.tasks.data.answers import DIGITS, last_number
from asyncrl.tasks.data.overlap import asked_key
from asyncrl.tasks.data.records import Table, is_local, open_table, usable
from asyncrl.tasks.payloads import checked_text
from asyncrl.tasks.shaping import has_form

CHAT_INSTRUCTION = "Reason step by step. Write the answer alone on the last line, in the form: #### 42"
MAX_HELD_OUT = 512
HUB_SUBSET = "main"

_FINAL_LINE = rf"(?:.*\n)?#### ?-?\$?-?(?:{DIGITS})"
_CALCULATION = re.compile(r"<<[^>]*>>")


class Gsm8k:
    """Word problems. Parts of the reward: `exact`, for the right last number, and `format`, for a last line `#### 42`.

    path: a .json or .jsonl file, or the name of a Hugging Face data set (needs the package `datasets`).
    eval_path: held-out records; without it, a data set's test split, or the last tenth of the file (1 to 512 records).
    exact_weight, format_weight: what the parts are worth. chat: prompts are chat messages.
    Data is read at the first example, so reward workers need none. Records that cannot be used are left out and named
    in `left_out`; more than a quarter of them is an error.
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

    @property
    def left_out(self) -> list[str]:
        """Records that are not used, each with its place and the reason."""
        return self._splits[2]

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """`exact` compares the completion's last number with the payload's answer, as decimal numbers."""
        exact = last_number(completion) == Decimal(payload["answer"])
        return {
            "exact": self._exact_weight * exact,
            "format": self._format_weight * has_form(completion, _FINAL_LINE),
        }

    @cached_property
    def _splits(self) -> tuple[_Records, _Records, list[str]]:
        """Training and held-out records, and what was left out of them."""
        table = _open(self._path)
        records, left_out = _records(table)
        if self._eval_path:
            test, more = _records(_open(self._eval_path))
            return _apart(self._path, records, test, left_out + more)
        if not is_local(self._path):
            test, more = _records(_open(self._path, "test"))
            return _apart(self._path, records, test, left_out + more)
        # One at least, if one is left to train on: a run without any evaluation shows little.
        num_held_out = min(MAX_HELD_OUT, max(1, len(records) // 10), len(records) - 1)
        num_train = len(records) - num_held_out
        return _apart(self._path, records[:num_train], records[num_train:], left_out)

    def _example(self, record: dict[str, str]) -> Example:
        answer = last_number(record["answer"])
        assert answer is not None, "records without a number were left out"
        prompt: str | Messages = prompt_text(record["question"])
        if self._chat:
            prompt = [{"role": "user", "content": f"{record['question']}\n{CHAT_INSTRUCTION}"}]
        return Example(prompt, {"answer": str(answer)})


_Records = list[dict[str, str]]


def _apart(path: str, train: _Records, test: _Records, left_out: list[str]) -> tuple[_Records, _Records, list[str]]:
    """The same without the training records that ask what a held-out one asks."""
    asked = {asked_key(record["question"]) for record in test}
    kept = [record for record in train if asked_key(record["question"]) not in asked]
    if equal := len(train) - len(kept):
        left_out = [*left_out, f"{equal} records of {path} that ask what a held-out one asks: not trained on"]
    return kept, test, left_out


def prompt_text(question: str) -> str:
    """The plain prompt; the completion starts with a line end or a blank."""
    return f"Question: {question}\nAnswer:"


def worked_answer(record: dict[str, str]) -> str:
    """A record's own answer as a completion of `prompt_text`, without the calculator's marks (<<48/2=24>>)."""
    return "\n" + _CALCULATION.sub("", record["answer"])


def read_records(path: str) -> list[dict[str, str]]:
    """Records of a JSON Lines file, each with `question` and `answer`; those that cannot be used are left out.

    Raises TaskError naming file and line when no record or less than three quarters can be used.
    """
    return _records(_open(path))[0]


def _open(path: str, split: str = "") -> Table:
    return open_table(path, split=split) if is_local(path) else open_table(path, HUB_SUBSET, split)


def _records(table: Table) -> tuple[list[dict[str, str]], list[str]]:
    """The records that can be used, and the others by place and reason."""
    return usable(table.name, table.rows(None), _checked)


def _checked(record: object) -> dict[str, str]:
    """The record. Raises TaskError with the reason where it cannot be used."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
        raise TaskError("must be an object with the texts `question` and `answer`")
    if not record["question"].strip():
        raise TaskError("has an empty question")
    try:
        checked_text(record["question"], "its question")
    except TaskError as error:
        raise TaskError(f"is not text: {error}") from None
    if last_number(record["answer"]) is None:
        raise TaskError(f"has no number in its answer: {record['answer'][-80:]!r}")
    return record

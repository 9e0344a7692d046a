"""Grade-school word problems (Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168).

Records are JSON Lines with `question` and `answer`, where the answer's last line is `#### 72`. The prompt is

    Question: Natalia sold clips to 48 of her friends ...
    Answer:

or, with `chat`, the question and a sentence on the form of the answer as one user message.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example, Messages
from asyncrl.tasks.payloads import checked_text
from asyncrl.tasks.shaping import has_form

CHAT_INSTRUCTION = "Reason step by step. Write the answer alone on the last line, in the form: #### 42"
MAX_HELD_OUT = 512
MAX_LEFT_OUT = 16  # records that cannot be used: more than this, and more than a quarter of all, is an error
MAX_LEFT_OUT_SHARE = 0.25

# 1,234.50 or 1234.50 or .5; a sign, before or after a $, counts unless it stands between two numbers (10-5).
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?<![\w.)])[-−]\$?|(?<![\w.)])\$-)?({_DIGITS})")
_FINAL_LINE = rf"(?:.*\n)?#### ?-?\$?-?(?:{_DIGITS})"
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
    def _splits(self) -> tuple[list[dict[str, str]], list[dict[str, str]], list[str]]:
        """Training and held-out records, and what was left out of them."""
        if not _is_file_name(self._path):
            train, left_out = _hub_records(self._path, "train")
            test, more = _file_records(self._eval_path) if self._eval_path else _hub_records(self._path, "test")
            return train, test, left_out + more
        records, left_out = _file_records(self._path)
        if self._eval_path:
            test, more = _file_records(self._eval_path)
            return records, test, left_out + more
        # One at least, if one is left to train on: a run without any evaluation shows little.
        num_held_out = min(MAX_HELD_OUT, max(1, len(records) // 10), len(records) - 1)
        num_train = len(records) - num_held_out
        return records[:num_train], records[num_train:], left_out

    def _example(self, record: dict[str, str]) -> Example:
        answer = last_number(record["answer"])
        assert answer is not None, "records without a number were left out"
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
    """Records of a JSON Lines file, each with `question` and `answer`; those that cannot be used are left out.

    Raises TaskError naming file and line when no record or less than three quarters can be used.
    """
    return _file_records(path)[0]


def _file_records(path: str) -> tuple[list[dict[str, str]], list[str]]:
    """The records of a JSON Lines file that can be used, and the others by line and reason."""
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise TaskError(
            f"{path} cannot be read ({error}); give a JSON Lines file with `question` and `answer`"
        ) from None
    # At "\n" alone: JSON texts may hold all else that Unicode calls a line end.
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    numbered = ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return _usable(path, ((where, _parsed(line)) for where, line in numbered))


def _usable(source: str, records: Iterable[tuple[str, object]]) -> tuple[list[dict[str, str]], list[str]]:
    """The records that can be used, and the others by place and reason; a record that is a text is itself a reason."""
    usable: list[dict[str, str]] = []
    left_out: list[str] = []
    for where, record in records:
        if fault := record if isinstance(record, str) else _fault(record):
            left_out.append(f"{where} {fault}")
        else:
            assert isinstance(record, dict), "nothing else is without fault"
            usable.append(record)
    if not usable and not left_out:
        raise TaskError(f"{source} holds no records")
    if not usable or len(left_out) > max(MAX_LEFT_OUT, MAX_LEFT_OUT_SHARE * (len(usable) + len(left_out))):
        raise TaskError(
            f"{len(left_out)} of {len(usable) + len(left_out)} records of {source} cannot be used: "
            f"{'; '.join(left_out[:3])}{'; ...' if len(left_out) > 3 else ''}"
        )
    return usable, left_out


def _parsed(line: bytes) -> object:
    """What a line holds; a text says why that cannot be read."""
    try:
        parsed = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"cannot be read: not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return parsed if isinstance(parsed, dict) else [parsed]


def _fault(record: object) -> str:
    """Why a record cannot be used; empty where it can."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
        return "must be an object with the texts `question` and `answer`"
    if not record["question"].strip():
        return "has an empty question"
    try:
        checked_text(record["question"], "its question")
    except TaskError as error:
        return f"is not text: {error}"
    if last_number(record["answer"]) is None:
        return f"has no number in its answer: {record['answer'][-80:]!r}"
    return ""


def _is_file_name(path: str) -> bool:
    return path.endswith((".json", ".jsonl")) or Path(path).expanduser().is_file()


def _hub_records(name: str, split: str) -> tuple[list[dict[str, str]], list[str]]:
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"task.args.path={name} is not a .jsonl file, and reading a Hugging Face data set needs the package "
            f"`datasets`: pip install datasets, or give a file"
        ) from None
    try:
        loaded = list(datasets.load_dataset(name, "main", split=split))
    except Exception as error:
        raise TaskError(
            f"data set {name!r}, split {split!r}, cannot be loaded ({type(error).__name__}: {error}); "
            f"give the path of a .jsonl file, or a data set with a configuration `main`"
        ) from error
    return _usable(f"{name}, split {split}", ((f"{name}, split {split}, record {n}", r) for n, r in enumerate(loaded)))

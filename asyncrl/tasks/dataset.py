r"""Your own data without code: a file or data set, its columns as prompts, and reward functions by their names.

    task:
      path: asyncrl.tasks.dataset:Dataset
      args:
        path: data/problems.jsonl           # {"question": ..., "answer": ...} a line
        template: "{question}\nEnd with: answer = NUMBER"
        chat: true
        rewards:
          right: {kind: regex, pattern: "answer = (-?\\d+)"}
          style: my_rewards:style           # def style(completion, question): ...

`asyncrl/tasks/README.md` is the manual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example
from asyncrl.tasks.data.order import curriculum_index
from asyncrl.tasks.data.records import Record, Table, open_table, usable
from asyncrl.tasks.data.results import as_number
from asyncrl.tasks.data.rewards import reward_functions, score
from asyncrl.tasks.data.wording import Asked, Wording, column_of, given_shots, nearest, value_at, with_shots
from asyncrl.tasks.shuffle import shuffled_index

MAX_HELD_OUT = 512
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class _Usable:
    """A record that can be used, its columns that are needed, and what tells equal prompts."""

    record: Record
    key: bytes


@dataclass(slots=True)
class _Division:
    """The records: to train on, held out, and shown in every prompt; and those that are left out, with the reason."""

    train: list[_Usable]
    held_out: list[_Usable]
    shots: list[Asked]
    left_out: list[str] = field(default_factory=list)


class Dataset:
    """Prompts and rewards of records. Everything is said by arguments.

    Records: path is a .jsonl, .json or .parquet file, a folder of them or of `save_to_disk`, or the name of a data set
    of the hub, with subset and split. Held out are the records of eval_path, or of eval_split of the same data set, or
    a seeded choice of eval_count or eval_share of all (by default a tenth, 512 at most). A prompt that is held out is
    never trained on, wherever it stands.

    Prompts: prompt is the column of a text or of chat messages (the assistant's last message is cut off, and is the
    answer where no column is); or template puts {columns} into a text. chat: a text is a message of the user. system:
    the first message. few_shot: how many training records are shown in every prompt, and not trained on; or pairs
    [question, answer]. few_shot_column: what is shown as their answer, if not the answer. chat_template_args: for the
    tokenizer's chat template.

    Rewards: rewards maps names of parts to `exact`, `number`, `regex` or functions (`asyncrl.tasks.data.rewards`),
    which get what their signature asks for. answer: the column of what is right. payload: further columns that travel
    with the prompt, for reward.parts.

    difficulty, curriculum: a column of numbers, and the number of prompts in which training comes from the easiest
    records to all. seed: of the choice of held-out records, and of the order of a curriculum.
    """

    part_names: tuple[str, ...] | None = None

    def __init__(
        self,
        path: str,
        rewards: Mapping[str, Any],
        *,
        subset: str = "",
        split: str = "",
        eval_path: str = "",
        eval_split: str = "",
        eval_share: float | None = None,
        eval_count: int | None = None,
        prompt: str = "",
        template: str = "",
        chat: bool = False,
        system: str = "",
        few_shot: int | Sequence[Sequence[str]] = 0,
        few_shot_column: str = "",
        chat_template_args: Mapping[str, Any] | None = None,
        answer: str = "",
        payload: Sequence[str] = (),
        difficulty: str = "",
        curriculum: int = 0,
        seed: int = 0,
    ):
        self._places = (path, subset, split)
        self._eval_places = (eval_path, eval_split)
        self._eval_share, self._eval_count = eval_share, eval_count
        if prompt and template:
            raise TaskError(f"task.args has a prompt ({prompt}) and a template; give one of them")
        self._wording = Wording(prompt or "prompt", template, chat, system)
        self._few_shot, self._few_shot_column = few_shot, few_shot_column
        self._template_args = dict(chat_template_args or {})
        self._functions = reward_functions(rewards)
        self._answer = answer
        self._payload = payload
        self._difficulty, self._curriculum = difficulty, curriculum
        self._seed = seed
        self._check()
        if all(function.gives_number for function in self._functions):
            self.part_names = tuple(function.name for function in self._functions)

    @property
    def train_size(self) -> int | None:
        """Records to train on, None with a curriculum, which has an order of its own. The first call reads the data."""
        if not self._division.train:
            raise TaskError(
                f"{self._places[0]} has no record to train on: all that can be used are held out, ask what a held-out "
                "one asks, or are shown as examples; lower task.args.eval_share, eval_count or few_shot"
            )
        return None if self._curriculum else len(self._division.train)

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`."""
        train = self._division.train
        if self._curriculum:
            index = curriculum_index(index, len(train), self._curriculum, self._seed)
        return self._example(train[index])

    def eval_examples(self, count: int) -> list[Example]:
        """See `Task.eval_examples`."""
        return [self._example(row) for row in self._division.held_out[:count]]

    @property
    def left_out(self) -> list[str]:
        """Records that are not used, each with its place and the reason."""
        return self._division.left_out

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """The parts that the functions of `rewards` give."""
        return score(self._functions, {**payload, "completion": completion})

    # -- arguments -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raises TaskError for arguments that fit no data."""
        if not self._places[0]:
            raise TaskError("task.args.path must name a file, a folder or a data set")
        eval_path, eval_split = self._eval_places
        if eval_path and eval_split:
            raise TaskError(f"task.args has eval_path={eval_path} and eval_split={eval_split}; give one of them")
        chosen = [name for name in ("eval_share", "eval_count") if getattr(self, f"_{name}") is not None]
        if len(chosen) > 1 or (chosen and (eval_path or eval_split)):
            others = [name for name, value in (("eval_path", eval_path), ("eval_split", eval_split)) if value]
            raise TaskError(f"task.args has {' and '.join([*chosen, *others])}, which both say what is held out")
        if self._eval_share is not None and not 0 <= self._eval_share <= 1:
            raise TaskError(f"task.args.eval_share={self._eval_share} must be from 0 to 1")
        if self._eval_count is not None and self._eval_count < 0:
            raise TaskError(f"task.args.eval_count={self._eval_count} must be 0 or more")
        if bool(self._difficulty) != bool(self._curriculum) or self._curriculum < 0:
            raise TaskError(
                f"task.args.difficulty={self._difficulty!r} and curriculum={self._curriculum} belong together: a "
                "column of numbers, and the number of prompts in which training comes from the easiest records to all"
            )
        if isinstance(self._few_shot, bool | str) or (isinstance(self._few_shot, int) and self._few_shot < 0):
            raise TaskError(f"task.args.few_shot={self._few_shot!r:.80} must be a number, or pairs [QUESTION, ANSWER]")
        if not isinstance(self._few_shot, int):
            given_shots(self._few_shot)
        if isinstance(self._payload, str):
            raise TaskError(f"task.args.payload={self._payload!r} must be a list of columns")

    # -- reading ---------------------------------------------------------------------------------------------------

    @cached_property
    def _division(self) -> _Division:
        """Reads the data. Raises TaskError."""
        rows, left_out = self._read(open_table(*self._places))
        eval_path, eval_split = self._eval_places
        if eval_path or eval_split:
            path, subset, _ = self._places
            source = open_table(eval_path) if eval_path else open_table(path, subset, eval_split)
            held_out, more = self._read(source)
            left_out = left_out + more
        else:
            held_out = self._chosen(rows)
        keys = {row.key for row in held_out}
        kept = [row for row in rows if row.key not in keys]
        chosen = 0 if eval_path or eval_split else len(held_out)
        if equal := len(rows) - len(kept) - chosen:
            left_out.append(f"{equal} records of {self._places[0]} that ask what a held-out one asks: not trained on")
        shots, train = self._shots(kept)
        if self._difficulty:
            train.sort(key=lambda row: as_number(value_at(row.record, self._difficulty)) or 0.0)
        return _Division(train, held_out, shots, left_out)

    def _read(self, table: Table) -> tuple[list[_Usable], list[str]]:
        """The records of one source that can be used, with the columns that are needed, and what is left out."""
        columns = self._needed_columns(table) if table.columns else set()
        return usable(table.name, table.rows(columns), self._row)

    def _row(self, record: object) -> _Usable:
        """Raises TaskError with the reason where a record cannot be used."""
        if not isinstance(record, dict):
            raise TaskError(f"must be an object with names and values, not {record!r:.80}")
        asked = self._wording.read(record)
        answer = self._answer_of(record, asked)
        for function in self._functions:
            function.check_answer(answer)
        if self._difficulty and as_number(value_at(record, self._difficulty)) is None:
            raise TaskError(f"has no number in its {self._difficulty}: {value_at(record, self._difficulty)!r:.80}")
        return _Usable(record, asked.key)

    def _needed_columns(self, table: Table) -> set[str]:
        """The columns that prompts, answers and rewards are made of. Raises TaskError for one that is not there."""
        key = "template" if self._wording.template else "prompt"
        asked = [(key, name) for name in self._wording.columns]
        named = (("answer", self._answer), ("few_shot_column", self._few_shot_column), ("difficulty", self._difficulty))
        asked += [(key, name) for key, name in named if name]
        asked += [("payload", name) for name in self._payload]
        needed = {"answer"} & set(table.columns)
        for key, name in asked:
            column = column_of(name, table.columns)
            if column is None:
                raise TaskError(f"task.args.{key}: {table.name} has no column {name}{nearest(name, table.columns)}")
            needed.add(column)
        return needed.union(*(function.columns(table.columns) for function in self._functions))

    def _chosen(self, rows: list[_Usable]) -> list[_Usable]:
        """The records that are held out of the training file, in a seeded order."""
        if self._eval_count is not None:
            count = self._eval_count
        elif self._eval_share is not None:
            count = round(self._eval_share * len(rows))
        else:  # one at least, if one is left to train on: a run without any evaluation shows little
            count = min(MAX_HELD_OUT, max(1, int(HELD_OUT_SHARE * len(rows))), len(rows) - 1)
        if count > len(rows):
            raise TaskError(
                f"task.args.eval_count={count} records are to be held out of {self._places[0]}, and {len(rows)} can be "
                "used"
            )
        return [rows[shuffled_index(rank, len(rows), "held-out", self._seed)] for rank in range(count)]

    def _shots(self, rows: list[_Usable]) -> tuple[list[Asked], list[_Usable]]:
        """The examples that every prompt shows, and the records that are left to train on."""
        if not isinstance(self._few_shot, int):
            return given_shots(self._few_shot), list(rows)
        shown = rows[: self._few_shot]
        keys = {row.key for row in shown}
        return [self._shot(row.record) for row in shown], [row for row in rows if row.key not in keys]

    def _shot(self, record: Record) -> Asked:
        asked = self._wording.read(record)
        answer = value_at(record, self._few_shot_column) if self._few_shot_column else asked.said
        if answer is None:
            answer = self._answer_of(record, asked)
        if isinstance(answer, list) or answer is None:
            raise TaskError(
                f"task.args.few_shot: the training record that asks {asked.text[-80:]!r} has no single answer to show: "
                "name the column of one in task.args.few_shot_column"
            )
        return Asked(asked.prompt, str(answer))

    # -- examples --------------------------------------------------------------------------------------------------

    def _answer_of(self, record: Record, asked: Asked) -> Any:
        """What is right: the column of that name, or else what the assistant says last. None where neither is."""
        answer = value_at(record, self._answer or "answer")
        return asked.said if answer is None and not self._answer else answer

    def _example(self, row: _Usable) -> Example:
        asked = self._wording.read(row.record)
        prompt = with_shots(asked.prompt, self._division.shots)
        return Example(prompt, self._payload_of(row.record, asked), self._template_args)

    def _payload_of(self, record: Record, asked: Asked) -> dict[str, Any]:
        """What rewards are given beside the completion: the answer, and what a function or `payload` asks for."""
        columns = {name: value_at(record, name) for name in self._payload}
        for function in self._functions:
            columns |= {name: record.get(name) for name in function.columns(record.keys() | function.needs)}
        if (answer := self._answer_of(record, asked)) is not None:
            columns["answer"] = answer
        for name, value in (("prompt", asked.text), ("messages", asked.messages)):
            if any(function.asks_for(name) for function in self._functions):
                columns[name] = value
        return columns

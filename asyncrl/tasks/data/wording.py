"""A record as a prompt: columns in a template, chat messages, what the system says, examples that are shown."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Messages
from asyncrl.tasks.data.records import Record
from asyncrl.tasks.payloads import checked_text

ASSISTANT = "assistant"
BETWEEN_SHOTS = "\n\n"  # of plain text

# {column}, and {{column}} for the braces themselves. All other braces stay as they are, those of LaTeX for example.
_PLACE = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a record asks: a text or chat messages. said: what the assistant answers there, None where that is open."""

    prompt: str | Messages
    said: str | None = None

    @property
    def messages(self) -> Messages:
        """As chat messages; a text is one of the user."""
        return [_user(self.prompt)] if isinstance(self.prompt, str) else self.prompt

    @property
    def text(self) -> str:
        """For reading: the text as it is; of chat messages, who says what."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)

    @property
    def key(self) -> bytes:
        """Equal where the prompts are equal."""
        return hashlib.blake2b(json.dumps(self.prompt).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Wording:
    """How records are worded. prompt: the column of a text or of chat messages; or template: a text with columns.

    chat: a text becomes a message of the user. system: the first message, where a record has no such one of its own.
    """

    prompt: str
    template: str = ""
    chat: bool = False
    system: str = ""

    def __post_init__(self) -> None:
        """Raises TaskError for what fits no record."""
        if self.template and not self.columns:
            raise TaskError(f"task.args.template={self.template!r:.80} names no column, as {{question}} does")
        if self.system and self.template and not self.chat:
            raise TaskError("task.args.system is a chat message, and prompts of a template are texts: set chat: true")

    @property
    def columns(self) -> list[str]:
        """The columns that a prompt is made of."""
        if not self.template:
            return [self.prompt]
        return list(dict.fromkeys(match[2] for match in _PLACE.finditer(self.template) if match[2]))

    def read(self, record: Record) -> Asked:
        """What the record asks. Raises TaskError with the reason where nothing can be asked."""
        if self.template:
            return self._of_text(_PLACE.sub(lambda match: _put(match, record), self.template))
        value = value_at(record, self.prompt)
        if isinstance(value, str):
            return self._of_text(value)
        if isinstance(value, list | tuple):
            return self._of_messages(value)
        raise TaskError(
            f"has no prompt: its {self.prompt} must be a text or a list of chat messages, not {value!r:.80}"
        )

    def _of_text(self, text: str) -> Asked:
        if not text.strip():
            raise TaskError("has an empty prompt")
        checked_text(text, "the prompt")
        if self.chat:
            return Asked(self._with_system([_user(text)]))
        if self.system:
            raise TaskError("has a text as its prompt, and task.args.system is a chat message: set chat: true")
        return Asked(text)

    def _of_messages(self, value: Sequence[object]) -> Asked:
        messages = [_message(place, message) for place, message in enumerate(value)]
        said = messages.pop()["content"] if messages and messages[-1]["role"] == ASSISTANT else None
        if not any(message["role"] != "system" for message in messages):
            raise TaskError(f"has no chat message that asks something: {list(value)!r:.80}")
        return Asked(self._with_system(messages), said)

    def _with_system(self, messages: Messages) -> Messages:
        if not self.system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def with_shots(prompt: str | Messages, shots: Sequence[Asked]) -> str | Messages:
    """The prompt after examples with their answers: before a text, or behind what the system says."""
    if not shots:
        return prompt
    if isinstance(prompt, str):
        texts = [_joined(shot) for shot in shots]
        return BETWEEN_SHOTS.join([*texts, prompt])
    shown: Messages = []
    for shot in shots:
        assert shot.said is not None, "an example has an answer"
        shown += [message for message in shot.messages if message["role"] != "system"]
        shown.append({"role": ASSISTANT, "content": shot.said})
    start = 1 if prompt[0]["role"] == "system" else 0
    return [*prompt[:start], *shown, *prompt[start:]]


def given_shots(pairs: Iterable[object]) -> list[Asked]:
    """The examples that are written in the configuration, as pairs of question and answer. Raises TaskError."""
    shots = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise TaskError(f"task.args.few_shot[{number}] must be two texts, [QUESTION, ANSWER], not {pair!r:.80}")
        shots.append(Asked(pair[0], pair[1]))
    return shots


def value_at(record: Record, column: str) -> Any:
    """The value in a column, or in a field of one, such as `reward_model.ground_truth`; None where there is none."""
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def column_of(name: str, columns: Collection[str]) -> str | None:
    """The column that `name` stands for, itself or the one it is a field of; None where there is none."""
    if name in columns:
        return name
    root = name.partition(".")[0]
    return root if root in columns and root != name else None


def nearest(name: str, known: Collection[str]) -> str:
    """For messages: which of the known names may have been meant, and which there are."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (there are {', '.join(sorted(known)) or 'none'})"


def _put(match: re.Match[str], record: Record) -> str:
    if match[1]:
        return f"{{{match[1]}}}"
    value = value_at(record, match[2])
    if value is None:
        raise TaskError(f"has no {match[2]}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _message(place: int, message: object) -> dict[str, Any]:
    """A chat message, without fields that are None: where one of a column has a field, parquet gives it to all."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TaskError(f"has no prompt: message {place} must have `role` and `content`, not be {message!r:.80}")
    content = message.get("content")
    if not isinstance(content, str):
        raise TaskError(f"has no prompt: the content of message {place} must be a text, not {content!r:.80}")
    checked_text(content, f"the content of message {place}")
    return {name: value for name, value in message.items() if value is not None}


def _joined(shot: Asked) -> str:
    """An example in one text. Between question and answer is a blank, unless either brings one."""
    assert shot.said is not None, "an example has an answer"
    apart = shot.text[-1:].isspace() or shot.said[:1].isspace()
    return f"{shot.text}{'' if apart else ' '}{shot.said}"

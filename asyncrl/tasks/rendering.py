"""From an example's prompt to token ids: text and chat messages, and the special tokens around them.

A tokenizer may put a begin token before a plain text and an end token behind it. A completion goes on where its prompt
stops, so an end token there is left out; and a begin token is not doubled where the text has it already.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Messages
from asyncrl.tasks.payloads import checked_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_SAMPLES = ("7", "a", "the", ".")  # any text that the vocabulary holds shows what is put around it
_ALWAYS: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}  # of a chat template


class NoChatTemplate(TaskError):
    """The task's prompts are chat messages, and the tokenizer cannot render any."""


class PromptEncoder:
    """Turns prompts into token ids. Says once in the log what it does about special tokens.

    num_rows: of the model's embedding; a prompt with a token beyond them is refused. None where that is not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_rows: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._num_rows = num_rows
        self._before, self._behind = self._put_around()
        self._said: set[str] = set()
        if self._behind:
            log.warning(
                "the tokenizer puts %s behind each text, after which nothing is left to say: it is left out of plain "
                "prompts",
                self._shown(self._behind),
            )
        self._check_rows()

    def encode(self, prompt: object, template_args: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
        """Token ids of one prompt: a text, or chat messages, whose template is given `template_args`.

        Raises TaskError with the reason when it cannot be one, NoChatTemplate when no chat messages can.
        """
        if isinstance(prompt, str):
            token_ids = self._encode_text(prompt)
        else:
            token_ids = self._encode_messages(prompt, template_args)
        if not token_ids:
            raise TaskError("the prompt has no tokens")
        if self._num_rows is not None and max(token_ids) >= self._num_rows:
            token = max(token_ids)
            raise TaskError(
                f"the prompt holds token {token} ({self._shown([token])}), and the model's embedding has "
                f"{self._num_rows} rows"
            )
        return token_ids

    def text_of(self, token_ids: list[int]) -> str:
        """What the model is given, special tokens included."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        assert isinstance(text, str), "the text of one prompt is one text"
        return text

    # -- plain text ------------------------------------------------------------------------------------------------

    def _encode_text(self, text: str) -> list[int]:
        if not text.strip():
            raise TaskError("the prompt is empty")
        checked_text(text, "the prompt")
        if not self._before and not self._behind:
            return self._ids(text)
        token_ids = self._ids(text, add_special_tokens=False)
        if self._before and token_ids[: len(self._before)] == self._before:
            self._say_once(
                f"the task's prompts begin with {self._shown(self._before)}, which the tokenizer would put before them "
                "too: it is not doubled"
            )
            return token_ids
        return [*self._before, *token_ids]

    def _put_around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text."""
        for sample in _SAMPLES:
            bare, whole = self._ids(sample, add_special_tokens=False), self._ids(sample)
            for start in range(len(whole) - len(bare) + 1 if bare else 0):
                if whole[start : start + len(bare)] == bare:
                    return whole[:start], whole[start + len(bare) :]
        return [], []  # it knows none of the samples: nothing is known, and nothing is changed

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    # -- chat messages ---------------------------------------------------------------------------------------------

    def _encode_messages(self, messages: object, template_args: Mapping[str, Any]) -> list[int]:
        checked = _checked_messages(messages)
        if self._tokenizer.chat_template is None:
            raise NoChatTemplate(
                "the task's prompts are chat messages, but the tokenizer has no chat template; use a chat model"
            )
        self._check_template_args(template_args)
        try:
            token_ids: Any = self._tokenizer.apply_chat_template(checked, **template_args, **_ALWAYS)
        except Exception as error:
            raise TaskError(
                f"the tokenizer's chat template refuses the messages ({type(error).__name__}: {error})"
            ) from error
        if token_ids and token_ids[-1] == self._tokenizer.eos_token_id:
            self._say_once(
                f"the chat template ends the prompt with {self._shown([token_ids[-1]])}, the end token: has it no "
                "part for add_generation_prompt?"
            )
        return list(token_ids)

    def _check_template_args(self, template_args: object) -> None:
        """Raises TaskError for arguments that are not for the template; says which of them it does not use."""
        if not isinstance(template_args, Mapping):
            raise TaskError(f"chat_template_args must be a mapping, not {template_args!r:.80}")
        if taken := template_args.keys() & _ALWAYS.keys():
            raise TaskError(f"chat_template_args has {min(taken)}, which is {_ALWAYS[min(taken)]} for every prompt")
        for name in template_args:
            if str(name) not in str(self._tokenizer.chat_template):
                self._say_once(f"chat_template_args.{name}: the tokenizer's chat template does not use it")

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _check_rows(self) -> None:
        if self._num_rows is None or len(self._tokenizer) <= self._num_rows:
            return
        beyond = sorted(number for number in self._tokenizer.get_vocab().values() if number >= self._num_rows)
        if beyond:
            log.warning(
                "the tokenizer knows %d tokens that the model's embedding of %d rows has none for, such as %s: a "
                "prompt that holds one of them is left out",
                len(beyond),
                self._num_rows,
                self._shown(beyond[:3]),
            )

    def _shown(self, token_ids: list[int]) -> str:
        return " ".join(str(token) for token in self._tokenizer.convert_ids_to_tokens(token_ids))

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            log.warning(words)


def last_user_text(prompt: str | Messages) -> str:
    """What the user says last in chat messages, of whatever role the last one is without a user; empty for a text."""
    if isinstance(prompt, str):
        return ""
    said = [message["content"] for message in prompt if message["role"] == "user"]
    return said[-1] if said else prompt[-1]["content"]


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    """Raises TaskError unless these are chat messages whose contents are texts."""
    if not isinstance(messages, list) or not messages:
        raise TaskError(f"the prompt must be a text or a list of chat messages, not {messages!r:.80}")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TaskError(f"message {place} must be a dict with `role` and `content`, not {message!r:.80}")
        content = message.get("content")
        if not isinstance(content, str):
            raise TaskError(f"the content of message {place} must be a text, not {content!r:.80}")
        checked_text(content, f"the content of message {place}")
    if not any(message["content"].strip() for message in messages):
        raise TaskError("the prompt is empty")
    if not messages[-1]["content"].strip():
        raise TaskError(f"the last message, of {messages[-1]['role']}, is empty")
    return [dict(message) for message in messages]

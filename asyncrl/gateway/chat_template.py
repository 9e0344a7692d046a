"""A tokenizer's chat template as text: renderings, what stands behind a marker in them, the special tokens there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from asyncrl.errors import AsyncRLError, ModelError

ChatMessage = dict[str, Any]  # as in an OpenAI request, but the arguments of calls are dicts
REPLY = "QZREPLYQZ"  # stands for a reply, in renderings that are made to find what follows one


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    chat_template: Any
    name_or_path: str

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The conversation as text."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Text of token ids."""

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens that stand beside the trained vocabulary, the special ones among them."""


class ChatFormatError(ModelError):
    """The tokenizer's chat template cannot be continued token by token. Names the template and the remedy."""


class CannotContinue(AsyncRLError):
    """The template refuses these messages, or they cannot follow that reply."""


@dataclass(frozen=True, slots=True)
class Special:
    """A special token in a text, and where it stands there."""

    token_id: int
    text: str
    start: int
    stop: int


class ChatTemplate:
    """Renders with the template of `tokenizer`; template_args are given to it each time."""

    def __init__(self, tokenizer: ChatTokenizer, template_args: Mapping[str, Any]) -> None:
        self.name = str(tokenizer.name_or_path) or "the tokenizer"
        if tokenizer.chat_template is None:
            raise ChatFormatError(f"{self.name} has no chat template; use a chat model")
        self._tokenizer = tokenizer
        self._args = dict(template_args)
        added = dict(tokenizer.get_added_vocab())
        self._ids = added
        self._pattern = re.compile(
            "|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)) or r"(?!)"
        )

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None, *, generate: bool) -> str:
        """The conversation as text; with `generate` up to where the assistant speaks. Raises CannotContinue."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=generate, tokenize=False, **self._args
            )
        except Exception as error:  # templates raise what they like
            raise CannotContinue(f"the chat template refuses the messages ({type(error).__name__}: {error})") from error
        return str(text)

    def behind(self, marker: str, messages: Sequence[ChatMessage], tools: Sequence[Any] | None, generate: bool) -> str:
        """What stands behind the marker in the conversation as text. Raises CannotContinue where it is not shown."""
        _, found, rest = self.render(messages, tools, generate=generate).partition(marker)
        if not found:
            raise CannotContinue("the chat template leaves out what the assistant said")
        return rest

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendering: the special tokens are those that it spells."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_behind(self, token_id: int, text: str) -> list[int]:
        """Token ids of a text that follows a special token. Raises CannotContinue where the two do not stand apart."""
        before = next(known for known, number in self._ids.items() if number == token_id)
        token_ids = self.encode(before + text)
        if token_ids[:1] != [token_id]:
            raise CannotContinue(f"the tokenizer makes more than one token of {before}, which ends replies")
        return token_ids[1:]

    def specials(self, text: str) -> Iterator[Special]:
        """The special tokens that the text spells, in their order."""
        for match in self._pattern.finditer(text):
            yield Special(self._ids[match[0]], match[0], match.start(), match.end())

    def is_special(self, token_id: int) -> bool:
        """Whether it is a token beside the trained vocabulary."""
        return token_id in self._ids.values()

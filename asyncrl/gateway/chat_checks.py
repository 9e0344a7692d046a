"""A chat format is tried out before anything is sampled with it: each trap of chat templates is a refusal by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.gateway.chat_format import (
    OPENING,
    SAMPLE_CALL,
    SAMPLE_RESULT,
    SAMPLE_TOOLS,
    CallStyle,
    ChatFormat,
)
from asyncrl.gateway.chat_template import REPLY, CannotContinue, ChatFormatError, ChatMessage, ChatTokenizer

SAID: ChatMessage = {"role": "assistant", "content": REPLY}
ASKED: ChatMessage = {"role": "user", "content": "QZNEXTQZ  of two\nlines"}
RESULT: ChatMessage = {**SAMPLE_RESULT, "content": "QZNEXTQZ  of one line"}
EARLIER: list[ChatMessage] = [
    {"role": "user", "content": "QZFIRSTQZ"},
    {"role": "assistant", "content": "QZEARLIERQZ"},
    OPENING,
]
REMEDY = "give the model's folder another chat_template.jinja"


def open_format(
    tokenizer: ChatTokenizer,
    end_ids: Sequence[int] = (),
    template_args: Mapping[str, Any] | None = None,
    *,
    tools: bool = False,
) -> ChatFormat:
    """The chat format of the tokenizer, tried out; `tools` says whether conversations will have results of tools.

    Raises ChatFormatError, which names the template and the remedy, where a reply has no end of its own, a message of
    the user or of a tool would be left out or altered, the bridge depends on what was said before, or the tokens of a
    bridge are not those that a rendering of the whole conversation has there.
    """
    chat_format = ChatFormat(tokenizer, end_ids, template_args)
    try:
        _check_bridge(chat_format, [], ASKED, SAID, None)
        if tools:
            _check_tools(chat_format)
    except CannotContinue as error:
        raise ChatFormatError(f"{chat_format.name}: {error}; {REMEDY}") from error
    return chat_format


def _check_tools(chat_format: ChatFormat) -> None:
    style = chat_format.call_style
    if style is CallStyle.NONE:
        raise ChatFormatError(
            f"{chat_format.name}: its chat template refuses messages of tools, or drops them without a word; use a "
            f"model that was trained with tools, or {REMEDY}"
        )
    if style is CallStyle.CONTENT:
        _check_bridge(chat_format, [], RESULT, SAID, SAMPLE_TOOLS)
    else:
        _check_bridge(chat_format, SAMPLE_CALL["tool_calls"], RESULT, SAMPLE_CALL, SAMPLE_TOOLS)


def _check_bridge(
    chat_format: ChatFormat,
    calls: Sequence[Mapping[str, Any]],
    message: ChatMessage,
    reply: ChatMessage,
    tools: list[Any] | None,
) -> None:
    """One bridge: it shows the message, is the same after another history, and is what the whole rendering has."""
    stop_ids = [token for token in chat_format.stop_ids if chat_format.template.is_special(token)]
    bridges = {token: chat_format.bridge(token, calls, [message], tools) for token in stop_ids}
    shortest = min(bridges.values(), key=len)  # after the token that ends this reply: the others are followed by it
    role, template = message["role"], chat_format.template
    whole = template.render([OPENING, chat_format.as_shown(reply), message], tools, generate=True)
    if message["content"] not in whole:
        raise ChatFormatError(f"{chat_format.name}: its chat template rewrites what the {role} says; {REMEDY}")
    stop_id = next(token for token in stop_ids if bridges[token] == shortest)
    if chat_format.bridge(stop_id, calls, [message], tools, opening=EARLIER) != shortest:
        raise ChatFormatError(
            f"{chat_format.name}: its chat template renders a message of the {role} otherwise after other messages, so "
            f"that what was said could not stay as it is; {REMEDY}"
        )
    if template.encode(whole)[-len(shortest) :] != shortest:
        raise ChatFormatError(
            f"{chat_format.name}: its tokenizer makes other tokens of a message that follows a reply than of the same "
            f"message in a whole conversation; use a tokenizer whose special tokens stand apart from texts, or {REMEDY}"
        )

r"""How a conversation goes on in tokens: the first prompt, and the bridge from each reply to the next one.

A chat template renders whole conversations, and may render an earlier turn differently once a later one is there: it
drops reasoning, trims, re-orders arguments. What the engine has seen cannot change, so nothing is rendered twice here.
The tokens of a conversation are the first prompt, the reply as it was sampled, the bridge, the next reply, and so on.

    prompt   <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n
    reply    Hi!<|im_end|>                                                   sampled, with the stop token
    bridge   \n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n    what follows, without that token

A bridge is cut out of the rendering of a short conversation whose reply is a marker: it is what stands behind that.
Where results of tools follow, the marker is an argument of the reply's last call, and the rest of the call is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from os.path import commonprefix
from typing import Any

from asyncrl.gateway.chat_template import (
    REPLY,
    CannotContinue,
    ChatFormatError,
    ChatMessage,
    ChatTemplate,
    ChatTokenizer,
)

OPENING: ChatMessage = {"role": "user", "content": "QZOPENINGQZ"}
_SAID: ChatMessage = {"role": "assistant", "content": REPLY}
_ASKED: ChatMessage = {"role": "user", "content": "QZNEXTQZ"}
SAMPLE_CALL: ChatMessage = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"text": "QZTEXTQZ"}}}
    ],
}
SAMPLE_RESULT: ChatMessage = {"role": "tool", "content": "QZNEXTQZ", "name": "look_up", "tool_call_id": "call00001"}
SAMPLE_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a text.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    }
]
MAX_SHAPES = 4096  # orders of roles that are remembered as shown in full


class CallStyle(Enum):
    """How a template takes calls of tools in an assistant's message."""

    DICT = "arguments as a mapping"
    TEXT = "arguments as JSON text"
    CONTENT = "it shows no calls, only what was said, and results"
    NONE = "it shows no results of tools"


@dataclass(frozen=True, slots=True)
class _Seam:
    """What a reply ends with: the token that was sampled last, as a rule, and the text that stands there in history.

    These differ where a template closes the last reply and earlier ones differently. cut is left out of the text that
    follows a reply which ended with stop_id; any other ending is followed by all of it.
    """

    stop_id: int
    cut: str


class ChatFormat:
    """The chat template of one tokenizer. `stop_ids` are the tokens at which a reply ends.

    end_ids: the end tokens that the model declares. Raises ChatFormatError where no reply could be ended.
    `chat_checks.open_format` makes one and tries it out.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, end_ids: Sequence[int] = (), template_args: Mapping[str, Any] | None = None
    ) -> None:
        self.template = ChatTemplate(tokenizer, template_args or {})
        self.name = self.template.name
        self._shown: set[tuple[Any, ...]] = set()
        try:
            self._seam, closing = self._find_seam()
        except CannotContinue as error:
            raise ChatFormatError(f"{self.name}: {error}; use another chat template") from error
        self._role_ends_reply = not closing
        stops = {*end_ids, self._seam.stop_id}
        self.call_style = self._find_call_style()
        if self.call_style in (CallStyle.DICT, CallStyle.TEXT):
            stops.add(self._after_calls(SAMPLE_CALL["tool_calls"], [SAMPLE_RESULT], SAMPLE_TOOLS)[1].stop_id)
        self.stop_ids = tuple(sorted(stops))

    def first(self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation that begins here, up to where the assistant speaks. Raises CannotContinue."""
        shown = [self.as_shown(message) for message in messages]
        return self.template.encode(self.template.render(shown, tools, generate=True))

    def bridge(
        self,
        last_token: int,
        calls: Sequence[Mapping[str, Any]],
        tail: Sequence[ChatMessage],
        tools: Sequence[Any] | None = None,
        *,
        opening: Sequence[ChatMessage] = (OPENING,),
    ) -> list[int]:
        """What goes between a reply and the next one: its end, if that was not sampled, `tail`, the assistant's role.

        last_token: of the reply, whatever it is. calls: of tools, as they were parsed of the reply. tail: messages of
        tools and of the user. opening: what stands before the reply in the rendering; it makes no difference (a check
        at the start). Raises CannotContinue where the template refuses or leaves out a message.
        """
        self._check_shown(calls, tail, tools)
        text, seam = self._following(calls, tail, tools, opening)
        if last_token == seam.stop_id:
            return self.template.encode_behind(last_token, text.removeprefix(seam.cut))
        return self.template.encode_behind(seam.stop_id, text)

    def as_shown(self, message: ChatMessage) -> ChatMessage:
        """The message as the template takes it: its calls' arguments as text, if it wants them so."""
        if not message.get("tool_calls") or self.call_style is not CallStyle.TEXT:
            return message
        shown = copy.deepcopy(message)
        for call in shown["tool_calls"]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return shown

    # -- what follows a reply --------------------------------------------------------------------------------------

    def _following(
        self,
        calls: Sequence[Mapping[str, Any]],
        tail: Sequence[ChatMessage],
        tools: Sequence[Any] | None,
        opening: Sequence[ChatMessage] = (OPENING,),
    ) -> tuple[str, _Seam]:
        has_results = any(message["role"] == "tool" for message in tail)
        if has_results and calls and self.call_style in (CallStyle.DICT, CallStyle.TEXT):
            return self._after_calls(calls, tail, tools, opening)
        text = self.template.behind(REPLY, [*opening, _SAID, *tail], tools, True)
        if self._role_ends_reply:
            return text, self._seam_of_role(text)
        if not text.startswith(self._seam.cut):
            raise CannotContinue(f"the chat template closes a reply otherwise than with {self._seam.cut!r} here")
        return text, self._seam

    def _after_calls(
        self,
        calls: Sequence[Mapping[str, Any]],
        tail: Sequence[ChatMessage],
        tools: Sequence[Any] | None,
        opening: Sequence[ChatMessage] = (OPENING,),
    ) -> tuple[str, _Seam]:
        """What follows the calls of a reply, from the token on that closes it."""
        said = self.as_shown({"role": "assistant", "content": "", "tool_calls": _with_marker(calls)})
        alone = self.template.behind(REPLY, [*opening, said], tools, False)
        whole = self.template.behind(REPLY, [*opening, said, *tail], tools, True)
        if not whole.startswith(alone):
            raise CannotContinue("the chat template shows a call otherwise once its result is there")
        marks = list(self.template.specials(alone))
        if self._role_ends_reply or not marks or alone[marks[-1].stop :].strip():
            text = whole[len(alone) :]
            return text, self._seam_of_role(text)
        return whole[marks[-1].start :], _Seam(marks[-1].token_id, marks[-1].text)

    def _seam_of_role(self, text: str) -> _Seam:
        """Where nothing closes a reply, the next role's token ends it."""
        role = next(self.template.specials(text), None)
        if role is None:
            raise CannotContinue(f"no special token stands between a reply and {text[:40]!r}")
        return _Seam(role.token_id, text[: role.stop])

    # -- what the template is like ---------------------------------------------------------------------------------

    def _find_seam(self) -> tuple[_Seam, bool]:
        """How replies without calls end, and whether anything closes them."""
        alone = self.template.behind(REPLY, [OPENING, _SAID], None, False)
        whole = self.template.behind(REPLY, [OPENING, _SAID, _ASKED], None, True)
        common = commonprefix([alone, whole])
        if shared := list(self.template.specials(common)):
            return _Seam(shared[-1].token_id, common[: shared[-1].stop]), True
        own, next_one = list(self.template.specials(alone)), next(self.template.specials(whole), None)
        if next_one is None or whole[: next_one.start].strip():
            raise ChatFormatError(
                f"{self.name}: its chat template ends a reply with {whole[:40]!r}, where no token of its own is a stop "
                "token; use a template whose turns end with a special token of the tokenizer"
            )
        if own:  # the last reply is closed by one token, an earlier one by another
            return _Seam(own[-1].token_id, whole[: next_one.stop]), True
        return self._seam_of_role(whole), False

    def _find_call_style(self) -> CallStyle:
        for style in (CallStyle.DICT, CallStyle.TEXT, CallStyle.CONTENT):
            self.call_style = style
            calls = [] if style is CallStyle.CONTENT else SAMPLE_CALL["tool_calls"]
            try:
                text, _ = self._following(calls, [SAMPLE_RESULT], SAMPLE_TOOLS)
            except CannotContinue:
                continue
            if text.count(SAMPLE_RESULT["content"]) == 1:
                return style
        return CallStyle.NONE

    def _check_shown(
        self, calls: Sequence[Mapping[str, Any]], tail: Sequence[ChatMessage], tools: Sequence[Any] | None
    ) -> None:
        """Raises CannotContinue where a message of the tail would be left out without a word."""
        shape = (bool(calls), bool(tools), *(message["role"] for message in tail))
        if shape in self._shown:
            return
        marked = [{**message, "content": f"QZTAIL{place}QZ"} for place, message in enumerate(tail)]
        text, _ = self._following(calls, marked, tools)
        for message in marked:
            if text.count(message["content"]) != 1:
                raise CannotContinue(
                    f"the chat template shows a message of the role {message['role']} "
                    f"{text.count(message['content'])} times here, not once"
                )
        if len(self._shown) < MAX_SHAPES:
            self._shown.add(shape)


def _with_marker(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The calls, with the marker as the only argument of the last one."""
    marked = [copy.deepcopy(dict(call)) for call in calls]
    function = marked[-1]["function"]
    name = next(iter(function["arguments"]), "text")
    function["arguments"] = {name: REPLY}
    return marked

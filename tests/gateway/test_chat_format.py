"""Bridges of 35 chat templates: cut out once, equal to what a whole rendering has, refused where they cannot be."""

from __future__ import annotations

import pytest

from asyncrl.gateway.chat_checks import open_format
from asyncrl.gateway.chat_format import SAMPLE_CALL, SAMPLE_RESULT, SAMPLE_TOOLS, CallStyle, ChatFormat
from asyncrl.gateway.chat_template import CannotContinue, ChatFormatError
from tests.gateway.tokenizers import NAMES, template_of, tokenizer_for, tokenizer_with

CALLS = SAMPLE_CALL["tool_calls"]
NO_RESULTS = {"cohere", "cohere2", "gemma", "gemma3", "phi3", "phi3_5"}
ONLY_RESULTS = {"deepseek_r1_distill", "lfm2", "llama3"}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def formats():
    return {name: open_format(tokenizer_for(name), tools=name not in NO_RESULTS) for name in NAMES}


def token(name, text):
    (found,) = tokenizer_for(name).encode(text, add_special_tokens=False)
    return found


def shown(name, token_ids):
    return tokenizer_for(name).decode(token_ids)


def test_all_35_templates_are_there():
    assert len(NAMES) == 35


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_accepted_with_the_stop_tokens_of_its_model(name, formats):
    stops = {shown(name, [stop]) for stop in formats[name].stop_ids}
    families = {
        "gemma4_v2": {"<turn|>"},
        "gemma4": {"<turn|>", "<|tool_response>"},
        "diffusion": {"<turn|>", "<|tool_response>"},
        "gemma": {"<end_of_turn>"},
        "glm": {"<|user|>", "<|observation|>"},
        "gptoss": {"<|return|>", "<|call|>"},
        "cohere": {"<|END_OF_TURN_TOKEN|>"},
        "deepseek": {"<｜end▁of▁sentence｜>"},
        "llama": {"<|eot_id|>"},
        "muse": {"<|eot|>"},
        "phi": {"<|end|>"},
    }
    assert stops == next((stops for family, stops in families.items() if name.startswith(family)), {"<|im_end|>"})


@pytest.mark.parametrize("name", NAMES)
def test_how_calls_are_taken(name, formats):
    style = formats[name].call_style
    expected = {"deepseekv3": CallStyle.TEXT} | dict.fromkeys(NO_RESULTS, CallStyle.NONE)
    expected |= dict.fromkeys(ONLY_RESULTS, CallStyle.CONTENT)
    assert style is expected.get(name, CallStyle.DICT)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_reply_and_bridge_of_the_user_make_the_conversation_that_the_template_renders(name, formats):
    """Reasoning is what templates rewrite later: a reply without any is rendered as it was said."""
    chat_format, tokenizer = formats[name], tokenizer_for(name)
    first, reply, then = user("What is  this?"), said("A test, \n no more."), user("And\n\nthat?  So?")
    whole = tokenizer.apply_chat_template([first, reply, then], tokenize=False, add_generation_prompt=True)
    end = chat_format._seam.stop_id
    bridge = chat_format.bridge(end, [], [then])
    text_before = whole[: whole.index("no more.") + len("no more.")] + chat_format._seam.cut
    assert text_before + shown(name, bridge) == whole
    assert tokenizer.encode(text_before, add_special_tokens=False) + bridge == tokenizer.encode(
        whole, add_special_tokens=False
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_RESULTS | ONLY_RESULTS])
def test_a_call_and_its_results_make_the_conversation_that_the_template_renders(name, formats):
    chat_format, tokenizer = formats[name], tokenizer_for(name)
    call = {
        "id": "call12345",
        "type": "function",
        "function": {"name": "look_up", "arguments": {"text": "a b", "n": 3}},
    }
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "It is 7.", "name": "look_up", "tool_call_id": "call12345"}
    messages = [user("Look."), chat_format.as_shown(reply), result]
    whole = tokenizer.apply_chat_template(messages, tools=SAMPLE_TOOLS, tokenize=False, add_generation_prompt=True)
    alone = tokenizer.apply_chat_template(messages[:2], tools=SAMPLE_TOOLS, tokenize=False)
    ends = [stop for stop in chat_format.stop_ids if shown(name, [stop]) in whole[len(alone) - 40 :]]
    bridges = [shown(name, chat_format.bridge(end, [call], [result], SAMPLE_TOOLS)) for end in ends]
    shortest = min(bridges, key=len)
    assert whole.endswith(shortest) and shortest.count("It is 7.") == 1
    if name != "qwen3":  # it takes back an empty block of reasoning once the result is there
        assert len(whole) - len(shortest) >= len(alone.rstrip("\n"))
    # One result more makes the bridge longer by that result, and by nothing of the call.
    two = chat_format.bridge(ends[0], [call], [result, {**result, "content": "Or 8."}], SAMPLE_TOOLS)
    assert shown(name, two).count("It is 7.") == shown(name, two).count("Or 8.") == 1


def test_what_was_not_sampled_is_written_in_the_bridge(formats):
    chat_format = formats["qwen3"]
    letter = tokenizer_for("qwen3").encode("x", add_special_tokens=False)[0]
    ended = chat_format.bridge(token("qwen3", "<|im_end|>"), [], [user("Go on.")])
    cut = chat_format.bridge(letter, [], [user("Go on.")])
    assert cut == [token("qwen3", "<|im_end|>"), *ended]
    assert shown("qwen3", ended) == "\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    result = [SAMPLE_RESULT]
    called = chat_format.bridge(token("qwen3", "<|im_end|>"), CALLS, result, SAMPLE_TOOLS)
    assert chat_format.bridge(letter, CALLS, result, SAMPLE_TOOLS) == [token("qwen3", "<|im_end|>"), *called]


def test_glm_ends_a_reply_with_the_next_role_which_is_not_repeated(formats):
    chat_format = formats["glm4moe"]
    end, other = token("glm4moe", "<|user|>"), token("glm4moe", "<|observation|>")
    letter = tokenizer_for("glm4moe").encode("x", add_special_tokens=False)[0]
    assert shown("glm4moe", chat_format.bridge(end, [], [user("Go on.")])) == "\nGo on.<|assistant|>"
    for last in (letter, other):  # it announced a result, and the user spoke
        assert shown("glm4moe", chat_format.bridge(last, [], [user("Go on.")])) == "<|user|>\nGo on.<|assistant|>"
    result = shown("glm4moe", chat_format.bridge(other, CALLS, [SAMPLE_RESULT], SAMPLE_TOOLS))
    assert result == "\n<tool_response>\nQZNEXTQZ\n</tool_response><|assistant|>"


def test_gpt_oss_closes_the_last_reply_otherwise_than_earlier_ones(formats):
    chat_format = formats["gptoss"]
    go_on = "<|start|>user<|message|>Go on.<|end|><|start|>assistant"
    letter = tokenizer_for("gptoss").encode("x", add_special_tokens=False)[0]
    assert shown("gptoss", chat_format.bridge(token("gptoss", "<|return|>"), [], [user("Go on.")])) == go_on
    assert shown("gptoss", chat_format.bridge(letter, [], [user("Go on.")])) == "<|end|>" + go_on
    result = shown("gptoss", chat_format.bridge(token("gptoss", "<|call|>"), CALLS, [SAMPLE_RESULT], SAMPLE_TOOLS))
    assert result.startswith("<|start|>functions.look_up to=assistant")


def test_gemma_4_goes_on_in_the_same_turn_after_a_result(formats):
    bridge = formats["gemma4"].bridge(token("gemma4", "<|tool_response>"), CALLS, [SAMPLE_RESULT], SAMPLE_TOOLS)
    assert shown("gemma4", bridge) == 'response:look_up{value:<|"|>QZNEXTQZ<|"|>}<tool_response|>'
    ended = formats["gemma4"].bridge(token("gemma4", "<turn|>"), CALLS, [SAMPLE_RESULT], SAMPLE_TOOLS)
    assert shown("gemma4", ended) == "<|tool_response>" + shown("gemma4", bridge)


def test_what_looks_like_the_marker_in_a_message_changes_nothing(formats):
    end = token("qwen3", "<|im_end|>")
    assert "QZREPLYQZ and QZTAIL0QZ" in shown(
        "qwen3", formats["qwen3"].bridge(end, [], [user("QZREPLYQZ and QZTAIL0QZ")])
    )


@pytest.mark.parametrize("name", ["gemma4", "phi3"])
def test_a_result_that_would_be_dropped_is_refused(name, formats):
    """Gemma 4 shows a result only behind a call; Phi-3 none."""
    with pytest.raises(CannotContinue, match="0 times here, not once"):
        formats[name].bridge(formats[name].stop_ids[0], [], [SAMPLE_RESULT], SAMPLE_TOOLS)


def test_messages_that_the_template_refuses_are_refused(formats):
    with pytest.raises(CannotContinue, match="Conversation roles must alternate"):
        formats["gemma"].bridge(formats["gemma"].stop_ids[-1], [], [user("a"), user("b")])


# -- refusals at the start -------------------------------------------------------------------------------------------


def refused(template, message, *, tools=False, name="bad"):
    with pytest.raises(ChatFormatError, match=message) as caught:
        open_format(tokenizer_with(template, name), tools=tools)
    assert str(caught.value).startswith(f"{name}")


@pytest.mark.parametrize("name", sorted(NO_RESULTS))
def test_tools_are_refused_at_the_start_where_results_are_dropped_or_refused(name):
    refused(template_of(name), "refuses messages of tools, or drops them without a word", tools=True, name=name)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
            "no token of its own is a stop",
        ),
        (CHATML.replace("CONTENT", "loop.index ~ m.content"), "otherwise after other messages"),
        (CHATML.replace("CONTENT", "m.content | replace('  ', ' ')"), "rewrites what the user says"),
        (CHATML.replace("CONTENT", "m.content if m.role != 'assistant'"), "leaves out what the assistant said"),
        (CHATML.replace("CONTENT", "m.content if m.role != 'user' or loop.first else ''"), "0 times here, not once"),
        (CHATML.replace("CONTENT", "m.nothing.of_the_sort"), "refuses the messages"),
    ],
)
def test_a_template_that_cannot_be_continued_is_refused(template, message):
    open_format(tokenizer_with(CHATML.replace("CONTENT", "m.content"), "good"))
    refused(template, message)


def test_a_template_that_shows_a_call_otherwise_once_its_result_is_there_shows_no_calls():
    """What was sampled as a call stays as it is, and the result follows it as any message would."""
    call = "'call ' ~ m.tool_calls[0].function.arguments.text ~ (' waits' if loop.last else ' done')"
    chat_format = ChatFormat(
        tokenizer_with(CHATML.replace("CONTENT", f"{call} if m.tool_calls else m.content"), "waits")
    )
    assert chat_format.call_style is CallStyle.CONTENT


class Joined:
    """A tokenizer with a prefix of its own before every text, as those with a begin token that cannot be left out."""

    def __init__(self, inner, first_only):
        self._inner, self._first_only = inner, first_only
        self.name_or_path, self.chat_template = "joined", inner.chat_template
        self.apply_chat_template, self.get_added_vocab = inner.apply_chat_template, inner.get_added_vocab

    def encode(self, text, **options):
        found = self._inner.encode(text, **options)
        return [0, *found] if self._first_only else [*found, found[-1]] if "QZOPENINGQZ" in text else found


@pytest.mark.parametrize("first_only", [True, False])
def test_a_tokenizer_whose_tokens_do_not_join_is_refused(first_only):
    tokenizer = Joined(tokenizer_for("qwen3"), first_only)
    with pytest.raises(ChatFormatError, match="other tokens of a message that follows a reply|more than one token"):
        open_format(tokenizer)


def test_a_model_without_a_template_is_refused():
    tokenizer = tokenizer_with("x", "base")
    tokenizer.chat_template = None
    with pytest.raises(ChatFormatError, match="use a chat model"):
        ChatFormat(tokenizer)

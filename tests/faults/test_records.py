"""Data, tasks, prompts and tokenizers that once ended a run or changed its numbers; each test names the fault."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import select
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from asyncrl.config import Config
from asyncrl.desk.evaluation import Evaluator
from asyncrl.desk.prompts import AHEAD, LeasedPrompts
from asyncrl.errors import ModelError, TaskError
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.link.codec import decode, encode
from asyncrl.link.messages import LeaseGrant
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.lease_records import Verdict
from asyncrl.replay.pacing import Pacing
from asyncrl.storage.records import PromptGivenUp
from asyncrl.tasks.base import Example
from asyncrl.tasks.gsm8k import Gsm8k
from asyncrl.tasks.helper import HelperLimits, TaskHelper
from asyncrl.tasks.payloads import MAX_LEVELS, MAX_VALUES, plain_payload
from asyncrl.tasks.pipe import PromptMade
from asyncrl.tasks.prompts import LeftOut, Prompt, PromptSource
from asyncrl.tasks.shuffle import example_index
from asyncrl.tasks.trial import helper_setup, task_part_names, trial
from asyncrl.types import LeaseKey, LeaseKind
from tests.desk.desk_parts import MetricsLog, make_parts, small_config, train_group
from tests.faults.tokenizer_folders import BEGIN_ID, END_ID, TEXT, byte_level_folder

MEBIBYTE = 2**20
UNRULY = "tests.e2e.unruly_task:Unruly"
SHORT = HelperLimits(start_s=30.0, example_s=1.0)
TEMPLATE_WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "NoSuchClass"])
def test_W5_learner_and_generator_use_one_tokenizer_class(tmp_path, named):
    folder = byte_level_folder(tmp_path, tokenizer_class=named)
    tokenizer = load_tokenizer(str(folder))
    token_ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == TEXT
    # The generator's engine has no other way to a tokenizer.
    engine = Path(__file__).parents[2] / "asyncrl" / "generator" / "engines" / "vllm" / "engine.py"
    assert "load_tokenizer(self._options.model_path)" in engine.read_text()


def test_W5_rewards_see_the_text_as_it_was_written_whatever_the_tokenizer_config_says(tmp_path):
    folder = byte_level_folder(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"clean_up_tokenization_spaces": true,', 1))
    tokenizer = load_tokenizer(str(folder))
    text = "it 's 42 ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_W5_a_tokenizer_that_does_not_decode_what_it_encoded_is_refused_with_both_texts(tmp_path):
    from tokenizers import decoders

    folder = byte_level_folder(tmp_path, decoder=decoders.Fuse())
    with pytest.raises(ModelError, match=r"decodes 'Answer: it is 42\.' to 'Answer:ĠitĠisĠ42\.', with 'Ġ' that"):
        load_tokenizer(str(folder))


def test_W5_a_tokenizer_that_changes_blanks_alone_is_warned_of(tmp_path, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", "Answer", ":", "it", "is", "42", "."]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    byte_level_folder(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unknown>").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_tokenizer(str(tmp_path))
    assert "decodes 'Answer: it is 42.' to 'Answer : it is 42 .'" in caplog.text


# -- W10 -----------------------------------------------------------------------------------------------------------


class Texts:
    """A task made of the given prompts."""

    def __init__(self, *prompts, payload=None, evals=()):
        self.prompts, self.payload, self.evals = prompts, payload or {}, list(evals)
        self.train_size = len(prompts)

    def train_example(self, index):
        return Example(self.prompts[index], self.payload or {"index": index})

    def eval_examples(self, count):
        return [Example(prompt, {}) for prompt in self.evals[:count]]

    def reward(self, completion, payload):
        return {"exact": 0.0}


def source_of(folder, *prompts, longest=50, **changes):
    return PromptSource(Texts(*prompts), load_tokenizer(str(folder)), 0, longest, **changes)


@pytest.mark.parametrize(
    ("template", "text", "before"),
    [
        ("$A", TEXT, []),
        ("$A <end>", TEXT, []),
        ("<begin> $A", TEXT, [BEGIN_ID]),
        ("<begin> $A <end>", TEXT, [BEGIN_ID]),
        ("<begin> $A", "<begin>" + TEXT, [BEGIN_ID]),
        ("<begin> $A <end>", "<begin>" + TEXT, [BEGIN_ID]),
        ("$A <end>", "<begin>" + TEXT, [BEGIN_ID]),
    ],
)
def test_W10_no_end_token_follows_a_prompt_and_no_begin_token_is_doubled(tmp_path, caplog, template, text, before):
    folder = byte_level_folder(tmp_path, template=template)
    with caplog.at_level(logging.WARNING):
        source = source_of(folder, text, text, text)
        made = [source.train(ordinal).token_ids.tolist() for ordinal in range(3)]
    bare = load_tokenizer(str(folder))(TEXT, add_special_tokens=False)["input_ids"]
    assert made == [before + bare] * 3
    assert sum("behind each text" in record.message for record in caplog.records) == ("<end>" in template)
    doubled = "<begin>" in template and "<begin>" in text
    assert sum("it is not doubled" in record.message for record in caplog.records) == doubled
    assert END_ID not in made[0]


def test_W10_a_chat_template_that_ends_with_the_end_token_is_warned_of_once(tmp_path, caplog):
    folder = byte_level_folder(tmp_path, chat_template="{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    source = source_of(folder, *[[{"role": "user", "content": "hi"}]] * 3)
    with caplog.at_level(logging.WARNING):
        assert all(source.train(ordinal).token_ids[-1] == END_ID for ordinal in range(3))
    assert sum("ends the prompt with <end>" in record.message for record in caplog.records) == 1


# -- D1, D5: the helper process ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Of a task that misbehaves as `task.args` says."""
    config = Config()
    config.model.path = str(
        byte_level_folder(
            tmp_path_factory.mktemp("model"), chat_template=TEMPLATE_WITHOUT_SYSTEM, extra_tokens=["<extra>"]
        )
    )
    config.model.max_length, config.sampling.max_new_tokens = 64, 16
    config.task.path = UNRULY
    config.eval.prompts = 2
    return config


def with_args(config: Config, **args) -> Config:
    config.task.args = args
    return config


REASONS = {
    "surrogate": r"the prompt holds the lone surrogate \\ud83d at character 2",
    "raise": "raised ValueError: record 3 is broken",
    "lookup": "raised KeyError: 'gold'",
    "exit": r"called sys\.exit\(0\)",
    "hard_exit": "the task ended its process with exit code 0",
    "killed": "the task's process was ended by SIGKILL",
    "block": "took longer than 1 s, and its process was killed",
    "pipes": "over the limit|cannot be read|carries",
    "recurse": "raised RecursionError",
    "empty": "the prompt is empty",
    "blank": "the prompt is empty",
    "none": "it must be an Example, not NoneType",
    "text": "it must be an Example, not str",
    "number": "the prompt must be a text or a list of chat messages, not 7",
    "bytes": "the prompt must be a text or a list of chat messages, not b'q'",
    "no_messages": r"the prompt must be a text or a list of chat messages, not \[\]",
    "no_role": "message 0 must be a dict with `role` and `content`",
    "no_content": "the content of message 0 must be a text, not None",
    "content_parts": r"the content of message 0 must be a text, not \[\{'type'",
    "empty_question": "the prompt is empty",
    "system": r"chat template refuses the messages \(TemplateError: System role not supported\)",
    "payload_set": r"payload\['answer'\] is of type set",
    "payload_none": "payload must be a dict, not NoneType",
    "unknown_token": r"the prompt holds token \d+ \(<extra>\), and the model's embedding has \d+ rows",
    "long": r"\d+ tokens, over the limit of 48 \(model\.max_length - sampling\.max_new_tokens\)",
}


def test_D1_each_kind_of_bad_example_is_left_out_by_name_and_reason_and_the_others_are_made(config):
    # Those that cost the helper's process are far apart: one after the other, they would be the task's fault.
    faults = {str(3 * number): fault for number, fault in enumerate(REASONS)}
    made = trial(with_args(config, size=200, faults=faults), 200, limits=SHORT)
    assert len(made.train) == 200 - len(faults)
    assert Counter(example.text for example in made.train) == Counter(
        str(index) for index in range(200) if str(index) not in faults
    )
    told = dict(line.removeprefix("training example ").split(": ", 1) for line in made.left_out)
    assert sorted(told) == sorted(faults)
    for index, fault in faults.items():
        assert re.search(REASONS[fault].replace("record 3", f"record {index}"), told[index]), told[index]


@pytest.mark.parametrize(
    "fault", ["raise", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("hard_exit", "killed"))]
)
def test_D1_a_task_whose_every_example_is_bad_ends_with_a_user_error_that_names_one(config, fault):
    with pytest.raises(TaskError, match="training example|the last is number") as caught:
        trial(with_args(config, size=40, faults={"all": fault}), 40, limits=SHORT)
    assert re.search(REASONS[fault].replace("record 3", r"record \d+"), str(caught.value))
    assert caught.value.exit_code == 2


def test_D1_a_chat_task_without_a_chat_template_is_refused_at_once(config, tmp_path):
    faults = {"all": "system"}
    config.model.path, before = str(byte_level_folder(tmp_path)), config.model.path
    try:
        with pytest.raises(TaskError, match="the tokenizer has no chat template; use a chat model"):
            trial(with_args(config, faults=faults), 1, limits=SHORT)
    finally:
        config.model.path = before


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("exit", r"task\.args=.*|task\.path=.* called sys\.exit\(0\)"),
        ("hard_exit", "the task ended its process with exit code 0 .making the task"),
        ("block", "took longer than 1 s, and its process was killed .making the task"),
    ],
)
def test_D5_a_constructor_that_blocks_or_exits_is_a_user_error(config, fault, says):
    limits = HelperLimits(start_s=1.0, example_s=1.0)
    with pytest.raises(TaskError, match=says):
        trial(with_args(config, constructor=fault), 1, limits=limits)
    with pytest.raises(TaskError, match=says):
        task_part_names(UNRULY, {"constructor": fault}, limits)


def test_D5_eval_examples_that_block_are_a_user_error_that_names_them(config):
    with pytest.raises(TaskError, match=r"took longer than 2 s.*making the held-out examples: eval_examples\(2\)"):
        trial(with_args(config, eval_fault="block"), 1, limits=HelperLimits(start_s=2.0))


class AsksWhatIsHeldOut:
    """Asks what `Unruly` asks in evaluations; its second example ends the process."""

    train_size = None
    part_names = ("exact",)

    def train_example(self, index):
        if index == 1:
            os._exit(0)
        return Example("eval 1", {})

    def eval_examples(self, count):
        return []

    def reward(self, completion, payload):
        return {"exact": 0.0}


def test_D5_a_helper_that_is_replaced_still_knows_what_the_tasks_of_a_mix_are_evaluated_on(config):
    tasks = {
        "unruly": {"path": UNRULY, "args": {"size": 50}, "evals": 2},
        "asks": {"path": f"{__name__}:{AsksWhatIsHeldOut.__name__}", "evals": 0},
    }
    mixed = replace(config, task=replace(config.task, path="asyncrl.tasks.mix:Mix", args={"tasks": tasks}))
    made = trial(mixed, 8, limits=SHORT)
    assert [example.text for example in made.held_out] == ["eval 0", "eval 1"]
    assert len(made.train) == 4 and not any("eval" in example.text for example in made.train)
    ended = [line for line in made.left_out if "ended its process" in line]
    asked = [line for line in made.left_out if "asks what a held-out example of the task unruly asks" in line]
    assert (len(ended), len(asked)) == (1, 3) and made.left_out.index(ended[0]) < made.left_out.index(asked[-1])


def test_D5_the_parts_of_a_task_are_asked_for_in_the_helper(config):
    assert task_part_names(UNRULY, {}) == ("exact",)


# -- D2 ------------------------------------------------------------------------------------------------------------


def nested(levels: int) -> dict:
    value: object = 1
    for _ in range(levels - 1):
        value = [value]
    return {"k": value}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Decimal(1), r"payload\['k'\] is of type Decimal"),
        (datetime.date(2024, 1, 1), r"payload\['k'\] is of type date"),
        (np.datetime64("2024-01-01"), r"payload\['k'\] is of type date"),
        (np.longdouble(1), r"payload\['k'\] is longdouble, which has no plain number"),
        (np.arange(3), r"payload\['k'\] is of type ndarray.*use \.tolist"),
        ({1}, r"payload\['k'\] is of type set"),
        ((x for x in "a"), r"payload\['k'\] is of type generator"),
        (1j, r"payload\['k'\] is of type complex"),
        (bytearray(b"x"), r"payload\['k'\] is of type bytearray"),
        (2**64, r"payload\['k'\] is an integer of more than 64 bits"),
        (-(2**63) - 1, r"payload\['k'\] is an integer of more than 64 bits"),
        ("1 \ud83d 2", r"payload\['k'\] holds the lone surrogate \\ud83d at character 2"),
        ({"\ud83d": 1}, "a key of payload.* holds the lone surrogate"),
        ({1: 2}, r"payload\['k'\] has the key 1, a int: keys must be texts"),
        ({(1, 2): 3}, r"payload\['k'\] has the key \(1, 2\), a tuple: keys must be texts"),
        ({np.int64(1): 2}, r"payload\['k'\] has the key .*, a int64: keys must be texts"),
        ([0, {"deep": [1, {2}]}], r"payload\['k'\]\[1\]\['deep'\]\[1\] is of type set"),
        ([0] * (MAX_VALUES + 1), "over 60000 keys and values"),
        ({str(n): [] for n in range(MAX_VALUES)}, "over 60000 keys and values"),
        ("x" * (MEBIBYTE + 1), "brings the payload over 1048576 bytes"),
        (nested(MAX_LEVELS), f"nested over {MAX_LEVELS} levels"),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_D2_a_payload_that_cannot_travel_is_refused_by_its_key(value, says):
    with pytest.raises(TaskError, match=says):
        plain_payload({"k": value}, MEBIBYTE)


def test_D2_a_payload_that_holds_itself_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(TaskError, match="nested over"):
        plain_payload({"k": loop}, MEBIBYTE)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(7), 7),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.bytes_(b"x"), b"x"),
        ((1, (2, 3)), [1, [2, 3]]),
        ([None, True, -1.5, "ä", b"\xff", {}], [None, True, -1.5, "ä", b"\xff", {}]),
        (LeaseKind.TRAIN, "train"),
        (nested(MAX_LEVELS - 1), nested(MAX_LEVELS - 1)),
        ([0] * (MAX_VALUES - 2), [0] * (MAX_VALUES - 2)),
        ({str(n): None for n in range(MAX_VALUES // 2 - 1)}, {str(n): None for n in range(MAX_VALUES // 2 - 1)}),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_D2_what_is_taken_arrives_at_the_generator_in_plain_types(value, plain):
    checked = plain_payload({"k": value}, MEBIBYTE)
    grant = LeaseGrant(
        run_epoch=1,
        kind=LeaseKind.TRAIN,
        ordinal=0,
        attempt=0,
        issued_version=0,
        deadline_s=1.0,
        prompt=b"",
        payload=checked,
        num_rollouts=1,
        max_new_tokens=1,
        temperature=1.0,
    )
    arrived = decode(encode(grant, max_bytes=4 * MEBIBYTE), max_bytes=4 * MEBIBYTE).payload["k"]
    assert arrived == plain == checked["k"]
    assert type(checked["k"]) is type(plain)


def test_D2_an_example_whose_payload_cannot_travel_is_left_out(tmp_path):
    folder = byte_level_folder(tmp_path)
    source = PromptSource(Texts("q", payload={"gold": Decimal(1)}), load_tokenizer(str(folder)), 0, 50)
    assert source.make(0) == LeftOut(
        0,
        "payload['gold'] is of type Decimal; a payload holds texts, numbers, booleans, None, bytes, and lists and "
        "dicts of them",
    )


# -- D3 ------------------------------------------------------------------------------------------------------------


def test_D3_in_a_sorted_data_set_each_example_that_fits_is_given_once_in_an_epoch(tmp_path):
    folder = byte_level_folder(tmp_path)
    prompts = ["a" * (1 + number) for number in range(100)]  # sorted by length; 80 of them fit

    def epochs(count):
        source = source_of(folder, *prompts, longest=80)
        made = [source.make(ordinal) for ordinal in range(100 * count)]
        return [found.payload["index"] for found in made if isinstance(found, Prompt)]

    given = epochs(3)
    assert Counter(given) == dict.fromkeys(range(80), 3)
    assert [sorted(given[start : start + 80]) for start in (0, 80, 160)] == [list(range(80))] * 3
    assert given[:80] != given[80:160]
    assert epochs(3) == given


def test_D3_a_limit_that_no_example_fits_is_named(config):
    with pytest.raises(TaskError, match=r"in a row, .* are all longer than 48 tokens .*; raise model\.max_length"):
        trial(with_args(config, size=30, faults={"all": "long"}), 200, limits=SHORT)


def test_D3_a_few_that_fit_are_enough(config):
    faults = {str(index): "long" for index in range(95)}
    made = trial(with_args(config, size=100, faults=faults), 200, limits=SHORT)
    assert Counter(example.index for example in made.train) == dict.fromkeys(range(95, 100), 2)


# -- D4, D14: files ------------------------------------------------------------------------------------------------

LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def records(count: int, question: str = "How many?") -> list[dict[str, str]]:
    return [{"question": f"{question} {number}", "answer": f"#### {number}"} for number in range(count)]


def jsonl(folder: Path, lines: list[str], *, end: str = "\n", before: bytes = b"") -> str:
    path = folder / "data.jsonl"
    path.write_bytes(before + "".join(line + end for line in lines).encode())
    return str(path)


@pytest.mark.parametrize("mark", [*LINE_ENDS, LINE_ENDS], ids=lambda mark: f"{mark!r}")
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_D4_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_taken(tmp_path, mark, end, before):
    # Control characters must be escaped in JSON; what lies above is legal as it is.
    lines = [json.dumps(record, ensure_ascii=mark < " ") for record in records(20, f"a{mark}b")]
    task = Gsm8k(jsonl(tmp_path, lines, end=end, before=before))
    assert (task.train_size, task.left_out) == (18, [])
    assert task.train_example(3).prompt == f"Question: a{mark}b 3\nAnswer:"


@pytest.mark.parametrize(("count", "train", "held_out"), [(1, 1, 0), (2, 1, 1), (9, 8, 1), (10, 9, 1), (25, 23, 2)])
def test_D14_a_tiny_data_set_holds_one_record_out(tmp_path, count, train, held_out):
    task = Gsm8k(jsonl(tmp_path, [json.dumps(record) for record in records(count)]))
    assert (task.train_size, len(task.eval_examples(64))) == (train, held_out)


def test_D14_a_task_without_held_out_examples_is_told_what_to_do(tmp_path):
    path = jsonl(tmp_path, [json.dumps(record) for record in records(1)])
    source = PromptSource(Gsm8k(path), load_tokenizer(str(byte_level_folder(tmp_path / "model"))), 0, 50)
    assert source.evals(0) == []
    with pytest.raises(TaskError, match=r"no held-out examples.*task\.args\.eval_path.*eval\.prompts=0"):
        source.evals(64)


BAD_LINES = {
    "truncated": ('{"question": "?", "ans', "is not JSON"),
    "no_object": ("[1]", "must be an object"),
    "number": ("7", "must be an object"),
    "null": ("null", "must be an object"),
    "text": ('"is not JSON"', "must be an object"),
    "no_answer": ('{"question": "?"}', "must be an object with the texts"),
    "null_answer": ('{"question": "?", "answer": null}', "must be an object with the texts"),
    "numeric_answer": ('{"question": "?", "answer": 7}', "must be an object with the texts"),
    "list_question": ('{"question": ["?"], "answer": "7"}', "must be an object with the texts"),
    "no_number": ('{"question": "?", "answer": "who knows"}', "has no number in its answer: 'who knows'"),
    "empty_answer": ('{"question": "?", "answer": ""}', "has no number in its answer"),
    "surrogate": (r'{"question": "1 \ud83d 2", "answer": "7"}', r"lone surrogate \\ud83d at character 2"),
    "empty_question": ('{"question": "", "answer": "7"}', "has an empty question"),
    "blank_question": ('{"question": " \\n", "answer": "7"}', "has an empty question"),
    "two_objects": ('{"question": "?", "answer": "7"}{}', "is not JSON"),
    "python": ("{'question': '?', 'answer': '7'}", "is not JSON"),
    "nested": ("[" * 100_000, "is not JSON"),
}


def test_D1_each_bad_line_of_a_file_is_left_out_by_its_number_and_reason(tmp_path):
    lines = [json.dumps(record) for record in records(200)]
    numbers = {7 * place + 2: kind for place, kind in enumerate(BAD_LINES)}
    for number, kind in numbers.items():
        lines[number - 1] = BAD_LINES[kind][0]
    task = Gsm8k(jsonl(tmp_path, lines))
    assert task.train_size + len(task.eval_examples(200)) == 200 - len(numbers)
    assert len(task.left_out) == len(numbers)
    for (number, kind), told in zip(numbers.items(), task.left_out, strict=True):
        assert re.search(rf"data\.jsonl, line {number} .*{BAD_LINES[kind][1]}", told), told


def test_D1_a_file_of_which_too_much_is_bad_is_refused(tmp_path):
    lines = [json.dumps(record) for record in records(60)] + ["{"] * 21
    with pytest.raises(TaskError, match=r"21 of 81 records of .* cannot be used: .*line 61 is not JSON"):
        Gsm8k(jsonl(tmp_path, lines)).train_size  # noqa: B018 - reading it is the point
    assert Gsm8k(jsonl(tmp_path, lines[:-2])).train_size == 54


# -- D13 -----------------------------------------------------------------------------------------------------------


def test_D13_tokens_without_a_row_are_said_at_the_start_and_a_prompt_with_one_is_left_out(tmp_path, caplog):
    folder = byte_level_folder(tmp_path, extra_tokens=["<extra>"])
    tokenizer = load_tokenizer(str(folder))
    rows = len(tokenizer) - 1
    with caplog.at_level(logging.WARNING):
        source = PromptSource(Texts("q <extra>"), tokenizer, 0, 50, num_rows=rows)
    assert f"knows 1 tokens that the model's embedding of {rows} rows has none for, such as <extra>" in caplog.text
    assert source.make(0) == LeftOut(
        0, f"the prompt holds token {rows} (<extra>), and the model's embedding has {rows} rows"
    )


# -- the desk's end ------------------------------------------------------------------------------------------------


class Slow:
    """A maker of prompts that gives them only when it is told to, and leaves some out."""

    fd, evals = -1, ()

    def __init__(self, left_out=()):
        self.left_out = set(left_out)
        self.asked: list[int] = []

    @property
    def num_asked(self):
        return len(self.asked)

    def ask(self, ordinals, now):
        self.asked += ordinals

    def take(self, now):
        if not now:
            return []
        made = [
            PromptMade(n, n, reason="it is bad")
            if n in self.left_out
            else PromptMade(n, n, np.array([n, n], np.int32).tobytes())
            for n in self.asked
        ]
        self.asked = []
        return made

    def next_deadline(self):
        return float("inf")

    def describe(self):
        return ""


def book_of(steps: int = 5) -> LeaseBook:
    return LeaseBook(Pacing(2, 1, steps), lease_timeout_s=60.0)


def test_D5_no_lease_is_granted_before_its_prompt_is_there_and_none_of_what_is_left_out():
    book = book_of()
    prompts = LeasedPrompts(Slow(left_out={0, 2}), book)
    prompts.advance(0.0)
    assert book.grant("g", 0, 4, 0, 0.0, lambda n: prompts.is_there(n, 0.0)) == []
    prompts.advance(1.0)
    granted = book.grant("g", 0, 4, 0, 1.0, lambda n: prompts.is_there(n, 1.0))
    assert [record.key.ordinal for record in granted] == [1, 3, 4, 5]
    assert [made.ordinal for made in prompts.take_left_out()] == [0, 2]
    assert (book.num_left_out, book.num_trained, book.num_given_up, book.num_admitted) == (2, 0, 0, 4)
    assert book.in_range(11) and not book.in_range(12)  # two more than the run's ten groups


def test_D1_what_was_left_out_stays_so_after_a_restart():
    book = book_of()
    prompts = LeasedPrompts(Slow(left_out={1, 6}), book)
    prompts.advance(0.0)
    prompts.advance(1.0)
    again = book_of()
    again.restore(book.state(), trained=[], accepted=[], given_up=[], filtered=[], left_out=[1, 6, 8])
    assert again.num_left_out == 3
    granted = again.grant("g", 0, 4, 0, 0.0)
    assert [record.key.ordinal for record in granted] == [0, 2, 3, 4]
    assert [again.is_done(n) for n in (1, 6, 8, 9)] == [True, True, True, False]


def test_D5_a_lease_of_before_a_restart_is_abandoned_when_its_example_is_left_out():
    book = LeaseBook(Pacing(2, 1, 5), lease_timeout_s=60.0, run_epoch=2)
    key = LeaseKey(LeaseKind.TRAIN, 3, 0)
    assert book.adopt("g", key, 0, 0.0)
    prompts = LeasedPrompts(Slow(left_out={3}), book)
    assert not prompts.is_there(3, 0.0)
    assert not prompts.is_there(3, 0.0)
    prompts.advance(1.0)
    assert [record.key for record in prompts.take_needless()] == [key]
    assert book.is_done(3) and book.num_running == 0
    assert book.accept(key).verdict is Verdict.DUPLICATE


def test_D5_a_result_whose_prompt_is_not_made_again_yet_is_not_acknowledged_and_taken_when_it_comes_again(tmp_path):
    parts = make_parts(tmp_path)
    try:
        session = parts.connect()
        parts.intake._prompts = prompts = LeasedPrompts(Slow(), parts.leases)
        group = train_group(0)
        parts.leases.grant("g1", 0, 1, 0, 0.0)
        assert parts.take(session, group, 1, now=0.0).reply is None
        assert parts.make_durable() == [] and len(parts.buffer) == 0
        prompts.advance(1.0)
        assert parts.take(session, group, 1, now=1.0).reply is None
        assert parts.make_durable() == [session] and len(parts.buffer) == 1
    finally:
        parts.journal.close()


def test_D1_a_record_of_what_is_left_out_keeps_the_reason_and_older_ones_are_read():
    for record in (PromptGivenUp(7), PromptGivenUp(7, "it is bad")):
        assert PromptGivenUp.from_payload(record.payload()) == record
    assert PromptGivenUp(7).payload() == b"\x07"


def test_D14_held_out_prompts_that_come_late_start_the_evaluation_that_was_due(tmp_path):
    parts = make_parts(tmp_path, small_config(eval__prompts=64))
    try:
        evaluator = Evaluator(
            parts.config,
            num_prompts=None,
            leases=parts.leases,
            acknowledgements=parts.acknowledgements,
            metrics=MetricsLog(),
            done=set(),
        )
        evaluator.advance(0, {0})
        evaluator.version_proven(0, 0.0)
        assert parts.leases.evaluation is None and not evaluator.idle
        assert evaluator.describe() == "the evaluation of version 0 waits for its prompts"
        evaluator.prompts_are_there(3, 1.0)
        assert (parts.leases.evaluation.version, parts.leases.evaluation.num_prompts) == (0, 3)
    finally:
        parts.journal.close()


@pytest.mark.slow
def test_D1_two_thousand_records_with_bad_ones_of_every_kind_are_all_trained_and_the_bad_ones_listed(config, caplog):
    """The desk's prompts and leases over the real helper process; a generator that answers each lease at once."""
    kinds = [kind for kind in REASONS if kind != "pipes"]  # what that writes may be taken for a frame that goes on
    faults = {str(80 * number + 7): kind for number, kind in enumerate(kinds)}
    assert len(faults) >= 24
    with_args(config, size=2000, faults=faults)
    book = LeaseBook(Pacing(40, 1, 50), lease_timeout_s=60.0)
    trained: list[int] = []
    left_out: dict[int, str] = {}
    with closing(TaskHelper(helper_setup(config), SHORT)) as helper, caplog.at_level(logging.WARNING):
        helper.start(time.monotonic())
        prompts = LeasedPrompts(helper, book)
        while book.num_trained < 2000:
            select.select([prompts.fd], [], [], 0.5 if helper.num_asked else 0.01)
            now = time.monotonic()
            prompts.advance(now)
            left_out |= {made.index: made.reason for made in prompts.take_left_out()}
            version = book.num_trained // 40
            for record in book.grant("g", version, 40, version, now, partial(prompts.is_there, now=now)):
                assert prompts.of(record.key).token_ids.size
                assert book.accept(record.key).verdict is Verdict.ACCEPTED
                trained.append(record.key.ordinal)
                book.train([record.key])
    bad = {int(index) for index in faults}
    assert set(left_out) == bad
    listed = Counter(re.findall(r"training example (\d+) is left out: ", caplog.text))
    assert listed == dict.fromkeys(faults, 1)
    for index, kind in faults.items():
        assert re.search(REASONS[kind].replace("record 3", f"record {index}"), left_out[int(index)])
    first_epoch = Counter(example_index(n, config.run.seed, 2000) for n in trained if n < 2000)
    assert first_epoch == Counter(index for index in range(2000) if index not in bad)
    assert len(trained) == len(set(trained)) == 2000


def test_D5_a_task_that_blocks_disturbs_nobody_once_the_run_stops(config):
    with closing(TaskHelper(helper_setup(with_args(config, constructor="block")), SHORT)) as helper:
        helper.start(0.0)
        prompts = LeasedPrompts(helper, book_of())
        prompts.advance(0.0)
        prompts.stop()
        assert prompts.next_deadline() == float("inf")
        prompts.advance(1e9)
        assert not prompts.is_there(0, 1e9)
        assert select.select([prompts.fd], [], [], 0.0)[0] == []


def test_D5_prompts_that_nobody_needs_any_more_are_let_go_of():
    book = LeaseBook(Pacing(400, 1, 10), lease_timeout_s=60.0)
    prompts = LeasedPrompts(Slow(), book)
    for step in range(10):
        while len(granted := book.grant("g", step, 400, step, 1.0, lambda n: prompts.is_there(n, 1.0))) == 0:
            prompts.advance(1.0)
        for record in granted:
            book.accept(record.key)
        book.train(record.key for record in granted)
        prompts.advance(1.0)
    assert sum(n in prompts for n in range(4000)) <= 3 * AHEAD

"""A chat file and rewards from the current directory, through the processes of a run: helper and reward worker."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from asyncrl.config import Config
from asyncrl.errors import TaskError
from asyncrl.rewards.pool import RewardPool
from asyncrl.tasks.base import Example
from asyncrl.tasks.fingerprint import run_settings, shared_settings
from asyncrl.tasks.prompts import LeftOut, PromptSource
from asyncrl.tasks.trial import task_part_names, trial
from tests.faults.tokenizer_folders import byte_level_folder

DATASET = "asyncrl.tasks.dataset:Dataset"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if enable_thinking is false %}<no thoughts>{% endif %}"
)
REWARDS = """
    import asyncio

    async def polite(completion, topic) -> float:
        await asyncio.sleep(0)
        return float("please" in completion) + (topic == "sums")
"""
ARGS = {
    "path": "chats.jsonl",
    "prompt": "messages",
    "system": "Be brief.",
    "chat_template_args": {"enable_thinking": False},
    "rewards": {"right": {"kind": "regex", "pattern": r"answer: (\d+)"}, "polite": "chat_rewards:polite"},
}


def chat(number: int) -> dict:
    said = [{"role": "user", "content": f"{number}+1?"}, {"role": "assistant", "content": str(number + 1)}]
    return {"messages": said, "topic": "sums"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on twenty chats and a broken line, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(20)) + "{")
    Path("chat_rewards.py").write_text(textwrap.dedent(REWARDS))
    config = Config()
    config.model.path = str(byte_level_folder(tmp_path / "model", chat_template=CHAT_TEMPLATE))
    config.model.max_length, config.sampling.max_new_tokens, config.eval.prompts = 128, 16, 8
    config.task.path, config.task.args = DATASET, ARGS
    return config


def score(config: Config, completions: list[str], payload: dict) -> list[dict[str, float] | None]:
    """What a reward worker of a generator gives."""

    async def scored():
        pool = RewardPool(config.task.path, config.task.args, 1, 10.0)
        try:
            await pool.start()
            return await pool.score(completions, payload)
        finally:
            await pool.close()

    return [outcome.parts for outcome in asyncio.run(scored())]


def test_a_chat_file_becomes_prompts_in_the_helper_and_rewards_in_a_worker(config):
    tried = trial(config, 18)
    assert (tried.train_size, tried.part_names, len(tried.held_out)) == (18, ("right", "polite"), 2)
    assert len(tried.left_out) == 1 and "chats.jsonl, line 21 is not JSON" in tried.left_out[0]
    texts = [example.text for example in [*tried.train, *tried.held_out]]
    assert sorted(texts) == sorted(
        f"<system>Be brief.<user>{number}+1?<assistant><no thoughts>" for number in range(20)
    )
    first = tried.train[0]
    answer = str(int(first.text.split("<user>")[1].split("+")[0]) + 1)
    assert first.payload == {"answer": answer, "topic": "sums"}
    right, wrong = score(config, [f"please, answer: {answer}", "answer: 99"], first.payload)
    assert right == {"right": 1.0, "polite": 2.0}
    assert wrong == {"right": 0.0, "polite": 1.0}


def test_reward_workers_need_neither_the_data_nor_its_packages(config):
    Path("chats.jsonl").unlink()
    assert score(config, ["please"], {"answer": "1", "topic": "x"}) == [{"right": 0.0, "polite": 1.0}]
    program = (
        "import sys\nfrom asyncrl.tasks.base import load_task\n"
        f"load_task({DATASET!r}, {ARGS!r}).reward('', {{'answer': '1', 'topic': 'x'}})\n"
        "print(sorted({'datasets', 'pyarrow', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_mix_of_it_and_another_task_runs_too(config):
    tasks = {
        "chats": {"path": DATASET, "args": ARGS, "weight": 2},
        "sums": {"path": "asyncrl.tasks.arithmetic:Arithmetic"},
    }
    config.task.path, config.task.args = "asyncrl.tasks.mix:Mix", {"tasks": tasks}
    names = ("chats/right", "chats/polite", "sums/exact")
    assert task_part_names(config.task.path, config.task.args) == names
    tried = trial(config, 6)
    assert (tried.train_size, tried.part_names, len(tried.held_out)) == (None, names, 8)
    asked = [example.payload["task_name"] for example in tried.train]
    assert sorted(asked) == ["chats"] * 4 + ["sums"] * 2
    sums = tried.train[asked.index("sums")]
    assert score(config, [sums.payload["answer"]], sums.payload) == [{"sums/exact": 1.0}]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"path": "none.jsonl"}, r"none\.jsonl cannot be read"),
        ({"rewards": {"polite": "chat_rewards:polit"}}, "has no function polit; did you mean polite?"),
        ({"answer": "gold"}, r"task\.args\.answer: chats\.jsonl has no column gold"),
        ({"prompt": "message"}, "has no column message; did you mean messages?"),
        ({"prompts": "messages"}, "'prompts'.*Dataset takes path: .*rewards"),
        ({"system": 7}, r"task\.args\.system=7 is text for Dataset"),
    ],
)
def test_mistakes_end_the_trial_with_their_reason(config, args, says):
    config.task.args = {**ARGS, **args}
    with pytest.raises(TaskError, match=says):
        trial(config, 1)


# -- arguments of the chat template ------------------------------------------------------------------------------------


class One:
    """One example, as it is given."""

    train_size = 1

    def __init__(self, example: Example):
        self.example = example

    def train_example(self, index):
        return self.example

    def eval_examples(self, count):
        return []

    def reward(self, completion, payload):
        return {"exact": 0.0}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"tokenize": False}, "chat_template_args has tokenize, which is True for every prompt"),
        ({"add_generation_prompt": False}, "has add_generation_prompt, which is True for every prompt"),
        ("enable_thinking", "chat_template_args must be a mapping, not 'enable_thinking'"),
    ],
)
def test_arguments_that_are_not_for_the_template_leave_the_example_out(config, args, says):
    from asyncrl.host.tokenizer import load_tokenizer

    example = Example([{"role": "user", "content": "x"}], {}, args)
    made = PromptSource(One(example), load_tokenizer(config.model.path), 0, 99).make(0)
    assert isinstance(made, LeftOut) and says in made.reason


def test_an_argument_that_the_template_does_not_use_is_warned_of_once(config, caplog):
    from asyncrl.host.tokenizer import load_tokenizer

    example = Example([{"role": "user", "content": "x"}], {}, {"enable_thinking": False, "enable_dreams": True})
    source = PromptSource(One(example), load_tokenizer(config.model.path), 0, 99)
    source.train(0)
    source.train(1)
    assert sum("enable_dreams: the tokenizer's chat template does not use it" in text for text in caplog.messages) == 1
    plain = PromptSource(One(replace(example, chat_template_args={})), load_tokenizer(config.model.path), 0, 99)
    assert source.encoder.text_of(source.train(0).token_ids.tolist()) == "<user>x<assistant><no thoughts>"
    assert plain.encoder.text_of(plain.train(0).token_ids.tolist()) == "<user>x<assistant>"


# -- what decides the run ----------------------------------------------------------------------------------------------


def test_the_source_of_reward_functions_is_compared_and_the_data_decides_a_resumed_run(config):
    names = [setting.name for setting in shared_settings(config)]
    assert "file chat_rewards (source)" in names
    assert "file asyncrl.tasks.data.rewards (source)" in names
    before = dict(run_settings(config))
    Path("chat_rewards.py").write_text("def polite(completion):\n    return 1.0\n")
    with open("chats.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(chat(20)))
    after = dict(run_settings(config))
    assert {name for name in before if before[name] != after[name]} == {
        "file chat_rewards (source)",
        "file chats.jsonl (task.args)",
    }

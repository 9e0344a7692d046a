"""`asyncrl run` on a chat file with rewards by their names, mixed with another task, from start to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.e2e.daemons import START_S, STEP_S, check_every_ordinal_once

STEPS = 5
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "<assistant>{% if enable_thinking is false %}!{% endif %}"
)


def chat_model(folder: Path, model_dir: Path) -> Path:
    """The tiny model with a chat template."""
    shutil.copytree(model_dir, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int) -> str:
    chats = [
        [{"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": str(n + 1)}] for n in range(count)
    ]
    path.write_text("\n".join(json.dumps({"messages": chat, "topic": "sums"}) for chat in chats) + "\n{")
    return str(path)


@pytest.mark.slow
def test_a_chat_file_and_another_task_are_trained_and_evaluated_each_by_its_name(make_run, tied_model_dir, tmp_path):
    chats = {
        "path": write_chats(tmp_path / "chats.jsonl", 40),
        "prompt": "messages",
        "chat_template_args": {"enable_thinking": False},
        "rewards": {"right": {"kind": "regex", "pattern": r"(\d+)"}, "letters": "letters_rewards:letters"},
    }
    tasks = {
        "chats": {"path": "asyncrl.tasks.dataset:Dataset", "args": chats, "weight": 3, "evals": 2},
        "letters": {"path": "letters_task:Letters"},
    }
    run = make_run(chat_model(tmp_path / "model", tied_model_dir)).configure(
        run={"steps": STEPS},
        task={"path": "asyncrl.tasks.mix:Mix", "args": {"tasks": tasks}},
        eval={"prompts": 4, "samples": 3, "temperature": 0.8},
    )
    command = run.one_host("transport.address=auto")
    run.wait_for_version(STEPS, command, timeout_s=START_S)
    assert command.exit_code(STEP_S) == 0, command.last_words()
    assert "left out of the data: chats:" in command.stderr and "line 41 is not JSON" in command.stderr
    names = {"chats/right", "chats/letters", "letters/base", "letters/letters"}
    steps, evals = run.records("step"), run.records("eval")
    assert [record["version"] for record in steps] == list(range(1, STEPS + 1))
    assert {name for record in steps for name in record["reward_parts"]} == names
    assert {record["version"] for record in evals} == {0, STEPS}
    for record in evals:
        assert (record["prompts"], record["samples"], record["temperature"]) == (4, 3, 0.8)
        assert record["reward_parts"].keys() == record["reward_parts_best"].keys() == names
        assert all(best > record["reward_parts"][name] - 1e-9 for name, best in record["reward_parts_best"].items())
        assert record["reward_best_mean"] > record["reward_mean"]
    assert all(record["rollouts_failed"] == {} for record in steps)
    check_every_ordinal_once(run, STEPS)

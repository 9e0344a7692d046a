"""The two daemons over a file of 2,000 records of which some are bad in every way that is known."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from asyncrl.storage.records import StepTaken
from asyncrl.tasks.helper import EXAMPLE_TIMEOUT_S
from asyncrl.tasks.shuffle import example_index
from tests.e2e.daemons import START_S, Run, wait_until
from tests.faults.test_records import BAD_LINES, REASONS, TEMPLATE_WITHOUT_SYSTEM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

GROUPS_PER_STEP = 40
STEPS = 49
KINDS = [kind for kind in REASONS if kind != "pipes"]  # what that writes may be taken for a frame that goes on
SIZE = STEPS * GROUPS_PER_STEP + len(KINDS)  # of the task: one epoch, in which each good example is trained once
RECORDS = SIZE + len(BAD_LINES)


def chat_model(folder: Path, model_dir: Path) -> Path:
    """The tiny model with a chat template that refuses system messages, and a token that it has no row for."""
    shutil.copytree(model_dir, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE_WITHOUT_SYSTEM
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def good_lines(count: int) -> list[str]:
    return [json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) for n in range(count)]


def trained_ordinals(run: Run) -> list[int]:
    return [ordinal for record in run.journal() if isinstance(record, StepTaken) for ordinal, _ in record.groups]


def test_a_run_over_bad_records_trains_all_others_to_its_end_and_lists_each_bad_one_once(
    make_run, tied_model_dir, tmp_path
):
    lines = good_lines(RECORDS)
    bad_lines = {100 * place + 2: kind for place, kind in enumerate(BAD_LINES)}
    for number, kind in bad_lines.items():
        lines[number - 1] = BAD_LINES[kind][0]
    faults = {str(80 * place + 7): kind for place, kind in enumerate(KINDS)}
    assert len(faults) >= 24 and RECORDS >= 2000
    data = write_lines(tmp_path / "data.jsonl", lines)
    args = {"path": data, "eval_path": write_lines(tmp_path / "held_out.jsonl", good_lines(4)), "faults": faults}
    run = make_run(chat_model(tmp_path / "model", tied_model_dir)).configure(
        run={"steps": STEPS},
        model={"max_length": 52},  # which leaves 48 for the prompt, as in `REASONS`
        task={"path": "unruly_task:UnrulyFile", "args": args},
        sampling={"group_size": 2, "max_new_tokens": 4},
        learner={"groups_per_step": GROUPS_PER_STEP},
        generator={"max_sequences": 64},
        checkpoint={"every": 0},
    )
    learner, generator = run.learner(), run.generator()
    wait_until(lambda: run.version() >= STEPS, 2 * START_S + 4 * EXAMPLE_TIMEOUT_S, "the last step", [learner])
    assert (learner.exit_code(), generator.exit_code()) == (0, 0)
    log = learner.stderr
    assert "Traceback" not in log

    listed = re.findall(r"left out of the data: .*data\.jsonl, line (\d+) (.*)", log)
    assert [int(number) for number, _ in listed] == sorted(bad_lines)
    for number, reason in listed:
        assert re.search(BAD_LINES[bad_lines[int(number)]][1], reason), (number, reason)

    told = re.findall(r"training example (\d+) is left out: (.*)", log)
    assert Counter(index for index, _ in told) == Counter(dict.fromkeys(faults, 1))
    for index, reason in told:
        wanted = (
            REASONS[faults[index]].replace("record 3", f"record {index}").replace("1 s", f"{EXAMPLE_TIMEOUT_S:g} s")
        )
        assert re.search(wanted, reason), (faults[index], reason)

    seed = run.config["run"]["seed"]
    trained = Counter(str(example_index(ordinal, seed, SIZE)) for ordinal in trained_ordinals(run))
    assert trained == Counter(str(index) for index in range(SIZE) if str(index) not in faults)

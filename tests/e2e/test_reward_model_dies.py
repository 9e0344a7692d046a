"""The two daemons with a reward model of the generator's own, which is killed while they train."""

from __future__ import annotations

import os
import signal
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.storage.records import StoredGroup
from asyncrl.types import Group
from tests.e2e.daemons import START_S, Run, check_every_ordinal_once, wait_until
from tests.reward_model_folders import make_tiny_reward_model, scores_by_transformers

pytestmark = pytest.mark.slow

STEPS = 30
WEIGHTS = {"exact": 1.0, "helpful": 0.25, "long": 0.0}


def model_server(run: Run) -> int | None:
    return next((pid for pid, command in run.processes().items() if "rewards.model_server" in command), None)


def groups_of(run: Run) -> list[Group]:
    stored = [record for record in run.journal() if isinstance(record, StoredGroup)]
    return [result_to_group(decode_body(GroupResult, record.body)) for record in stored]


def test_a_run_outlives_its_reward_model_and_no_failure_becomes_a_reward(make_run, tied_model_dir, tmp_path):
    folder = make_tiny_reward_model(tmp_path / "reward_model")
    # Short tries, so that what is under way when the server dies fails before the next one is up.
    helpful = {"kind": "reward_model", "path": str(folder), "timeout_s": 1.0, "retries": 0}
    run = make_run().configure(
        run={"steps": STEPS},
        task={"path": "asyncrl.tasks.arithmetic:Arithmetic"},
        reward={
            "parts": {"helpful": helpful, "long": {"kind": "length", "max_tokens": 12}},
            "weights": WEIGHTS,
        },
        checkpoint={"every": 0},
    )
    learner, generator = run.learner(), run.generator()
    run.wait_for_version(3, learner, generator, timeout_s=START_S)
    first = model_server(run)
    os.kill(first, signal.SIGKILL)
    generator.wait_for_log("was ended by SIGKILL; starting it again")
    wait_until(lambda: run.version() >= STEPS, START_S, "the last step", None)
    assert (learner.exit_code(), generator.exit_code()) == (0, 0)

    # Failures were counted, by reason; the prompts that they hit were leased again and trained.
    failed: Counter[str] = Counter()
    for record in run.records("step"):
        failed.update(record["rollouts_failed"])
    assert sum(failed.values()) > 0
    assert set(failed) <= {"reward_error", "reward_timeout"}
    check_every_ordinal_once(run, STEPS)

    # Every reward that was journalled is the sum of what the parts are by themselves.
    tokenizer = AutoTokenizer.from_pretrained(tied_model_dir)

    def text(token_ids: np.ndarray) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    scored = [
        (rollout, text(group.prompt_token_ids) + text(rollout.token_ids))
        for group in groups_of(run)
        for rollout in group.rollouts
    ]
    scores = scores_by_transformers(folder, [whole for _, whole in scored])
    for (rollout, _), (score,) in zip(scored, scores, strict=True):
        assert rollout.reward_parts["helpful"] == pytest.approx(score, abs=1e-3)
        assert rollout.reward_parts["long"] == -min(1.0, rollout.num_tokens / 12)
        expected = sum(WEIGHTS[name] * value for name, value in rollout.reward_parts.items())
        assert rollout.reward == pytest.approx(expected, abs=1e-6)
        assert rollout.reward != 0.0

    # Each part is in the metrics under its name.
    assert set(run.records("step")[-1]["reward_parts"]) == set(WEIGHTS)
    wait_until(lambda: not run.processes(), 10.0, f"no process of the run: {run.processes()}")

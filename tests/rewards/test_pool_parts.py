"""Judges and reward models behind the real reward pool: real workers, real servers, and servers that die."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.errors import TaskError
from asyncrl.rewards.gate import ServerGate
from asyncrl.rewards.pool import RewardPool
from tests.reward_model_folders import make_tiny_reward_model, scores_by_transformers
from tests.rewards.judge_server import DIES, SAID

JUDGE_SERVER = Path(__file__).parent / "judge_server.py"
ARITHMETIC = "asyncrl.tasks.arithmetic:Arithmetic"
RIGHT, WRONG = "15,10=105", "105=1"
PAYLOAD = {"answer": "105"}


class Judge:
    """A judge's process, at the same port in each of its lives."""

    def __init__(self):
        self.port = 0
        self.start()

    def start(self):
        command = [sys.executable, JUDGE_SERVER, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def part(self, **arguments):
        url = f"http://127.0.0.1:{self.port}/v1"
        return {"kind": "judge", "url": url, "model": "m", "timeout_s": 5.0, "retries": 0, **arguments}

    def kill(self):
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def judge():
    judge = Judge()
    yield judge
    judge.kill()


def with_pool(work, parts, weights=None, *, workers=1, timeout_s=60.0, **settings):
    async def run():
        gate = ServerGate(max_pause_s=0.5)
        pool = RewardPool(ARITHMETIC, {}, workers, timeout_s, parts=parts, weights=weights, gate=gate, **settings)
        try:
            async with asyncio.timeout(240):
                await pool.start()
                return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_the_reward_is_the_weighted_sum_of_the_tasks_parts_local_ones_and_the_judges(judge):
    parts = {
        "judge": judge.part(template="{prompt}{completion}, right is {answer}"),
        "overlong": {"kind": "overlong", "max_tokens": 10, "margin": 4},
        "math": {"kind": "math"},
    }
    weights = {"exact": 2.0, "judge": 0.5, "overlong": 1.0, "math": 0}
    right, wrong = with_pool(lambda pool: pool.score([RIGHT, WRONG], PAYLOAD, "47+58=", [8, 10]), parts, weights)
    assert right.parts == {"exact": 1.0, "overlong": -0.5, "math": 1.0, "judge": 0.5}
    assert right.reward == 2.0 - 0.5 + 0.25
    assert wrong.parts == {"exact": 0.0, "overlong": -1.0, "math": 0.0, "judge": 0.5}
    assert wrong.reward == -1.0 + 0.25


def test_each_way_to_answer_badly_fails_its_completion_alone(judge, caplog):
    completions = [text for word in SAID for text in (f"{word}=105", RIGHT)]
    parts = {"judge": judge.part(timeout_s=4.0, concurrency=16)}  # for the one that hangs; all others answer at once
    outcomes = with_pool(lambda pool: pool.score(completions, PAYLOAD), parts)
    assert [outcome.detail for outcome in outcomes[1::2]] == [""] * len(SAID)
    assert [outcome.parts for outcome in outcomes[1::2]] == [{"exact": 1.0, "judge": 0.5}] * len(SAID)
    failed = dict(zip(SAID, outcomes[::2], strict=True))
    assert {word: outcome.reason for word, outcome in failed.items()} == {
        word: "reward_timeout" if word == "HANGS" else "reward_error" for word in SAID
    }
    assert all(outcome.parts is None and outcome.detail.startswith("judge: ") for outcome in failed.values())
    assert "reward worker replaced" not in caplog.text


def test_a_judge_that_dies_in_the_middle_of_a_job_costs_what_it_had_not_answered(judge, caplog):
    """One request at a time, so the order is certain: three answers, the death, then nobody."""

    async def work(pool):
        first = await pool.score([RIGHT, WRONG, RIGHT, DIES, RIGHT, RIGHT], PAYLOAD)
        assert judge.process.wait(10) == 1
        down = await pool.score([RIGHT, RIGHT], PAYLOAD)
        # Two groups find the gate closed; while they wait for the judge it comes back.
        waiting = asyncio.gather(*(pool.score([RIGHT, WRONG], PAYLOAD) for _ in range(2)))
        judge.start()
        return first, down, await waiting, await pool.score([RIGHT], PAYLOAD)

    first, down, waited, (last,) = with_pool(work, {"judge": judge.part(concurrency=1)})
    assert [outcome.reason for outcome in first] == ["", "", "", *["reward_error"] * 3]
    assert [outcome.reward for outcome in first[:3]] == [1.5, 0.5, 1.5]
    assert all(outcome.failed and outcome.server_down for outcome in down)
    assert last.reward == 1.5
    assert "reward worker replaced" not in caplog.text
    # At most the trials found nobody: each fails whole, and none as a zero.
    for group in waited:
        assert [outcome.failed for outcome in group] in ([False, False], [True, True])


def test_while_a_judge_is_down_groups_wait_and_do_not_fail_one_after_another(judge):
    async def work(pool):
        judge.kill()
        (down,) = await pool.score([RIGHT], PAYLOAD)
        waiting = [asyncio.create_task(pool.score([RIGHT], PAYLOAD)) for _ in range(30)]
        # The gate lets one through per pause; by the time two have failed, the other 28 are still waiting.
        while sum(task.done() for task in waiting) < 2:
            await asyncio.sleep(0.01)
        assert sum(task.done() for task in waiting) <= 4
        judge.start()
        return down, [outcome for (outcome,) in await asyncio.gather(*waiting)]

    down, outcomes = with_pool(work, {"judge": judge.part()}, workers=2)
    assert down.failed
    assert sum(outcome.failed for outcome in outcomes) <= 6
    assert {outcome.reward for outcome in outcomes if not outcome.failed} == {1.5}


def test_a_group_that_waits_for_a_dead_judge_can_be_given_up_without_losing_a_worker(judge):
    async def work(pool):
        judge.kill()
        await pool.score([RIGHT], PAYLOAD)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await pool.score([RIGHT], PAYLOAD)
        judge.start()
        while (outcome := (await pool.score([RIGHT], PAYLOAD))[0]).failed:
            pass
        return outcome

    assert with_pool(work, {"judge": judge.part()}).reward == 1.5


def test_a_rule_that_hangs_beside_a_judge_costs_its_worker_and_its_completion(judge, tmp_path, monkeypatch):
    body = "    time.sleep(600 * ('slow' in completion))\n    return 1\n"
    (tmp_path / "slow_rule.py").write_text(f"import time\n\ndef slow(completion, payload):\n{body}")
    monkeypatch.chdir(tmp_path)
    parts = {"judge": judge.part(timeout_s=3.0), "rule": {"kind": "rule", "path": "slow_rule:slow"}}
    outcomes = with_pool(lambda pool: pool.score([RIGHT, "slow", WRONG], PAYLOAD), parts, timeout_s=4.0)
    assert [outcome.reason for outcome in outcomes] == ["", "reward_timeout", ""]
    assert [outcomes[0].reward, outcomes[2].reward] == [2.5, 1.5]


def test_the_key_comes_from_the_environment_and_its_lack_is_said_at_the_start(judge, monkeypatch):
    parts = {"judge": judge.part(api_key_env="KEY_OF_THE_JUDGE")}
    with pytest.raises(TaskError, match="KEY_OF_THE_JUDGE: this environment variable is empty or not set"):
        with_pool(lambda pool: None, parts)
    monkeypatch.setenv("KEY_OF_THE_JUDGE", "secret")
    (outcome,) = with_pool(lambda pool: pool.score([RIGHT], PAYLOAD), parts)
    assert outcome.reward == 1.5


def test_a_reward_model_that_is_killed_in_the_middle_fails_what_it_had_and_comes_back(tmp_path):
    folder = make_tiny_reward_model(tmp_path / "model")
    expected = [row[0] for row in scores_by_transformers(folder, [f"47+58={text}" for text in (RIGHT, WRONG)])]

    async def work(pool):
        (server,) = pool._models._servers
        before = await pool.score([RIGHT, WRONG], PAYLOAD, "47+58=")
        # Stopped first: requests are under way for certain when it dies.
        os.kill(server.pid, signal.SIGSTOP)
        under_way = asyncio.create_task(pool.score([RIGHT, WRONG], PAYLOAD, "47+58="))
        await asyncio.wait([under_way], timeout=1.0)
        os.kill(server.pid, signal.SIGKILL)
        lost = await under_way
        after = lost
        while any(outcome.failed for outcome in after):
            after = await pool.score([RIGHT, WRONG], PAYLOAD, "47+58=")
        return before, lost, after

    parts = {"helpful": {"kind": "reward_model", "path": str(folder), "timeout_s": 2.0, "retries": 0}}
    before, lost, after = with_pool(work, parts, {"helpful": 0.25}, log_prefix=str(tmp_path / "generator"))
    assert [outcome.parts["helpful"] for outcome in before] == pytest.approx(expected, abs=1e-4)
    assert [outcome.reward for outcome in before] == pytest.approx(
        [1.0 + 0.25 * expected[0], 0.25 * expected[1]], abs=1e-4
    )
    assert [outcome.reason in ("reward_error", "reward_timeout") for outcome in lost] == [True, True]
    for again, once in zip(after, before, strict=True):
        assert again.parts == pytest.approx(once.parts, abs=1e-4)  # other texts in its batch move the last digit

"""Judge and reward model behind vLLM's own server, through the real pool. Minutes on a busy machine, hence slow."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from asyncrl.rewards.pool import RewardPool
from tests.reward_model_folders import MAX_LENGTH, make_tiny_reward_model, scores_by_transformers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

READY_TIMEOUT_S = 300.0
RIGHT, WRONG = "15,10=105", "105=1"


class VllmServer:
    """`vllm serve` of a folder, at the same port in each of its lives."""

    def __init__(self, folder: Path, *arguments: str):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder.parent / "vllm.log"
        options = {"model": folder, "host": "127.0.0.1", "port": self.port, "dtype": "float32"}
        options |= {"max-model-len": MAX_LENGTH, "block-size": 32, "max-num-seqs": 8}
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *arguments]
        self.command += [f"--{name}={value}" for name, value in options.items()]
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """With its engine, which is a process of its own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(folder: Path, *arguments: str) -> VllmServer:
        servers.append(VllmServer(folder, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


def with_pool(work, parts, weights=None):
    async def run():
        task = "asyncrl.tasks.arithmetic:Arithmetic"
        pool = RewardPool(task, {}, 1, 120.0, parts=parts, weights=weights)
        try:
            await pool.start()
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_vllms_classify_and_score_give_what_the_model_gives(serve, tmp_path):
    folder = make_tiny_reward_model(tmp_path / "model")
    server = serve(folder, "--runner=pooling")
    common = {"kind": "reward_model", "url": server.url, "timeout_s": 30.0}
    parts = {
        "text": common,
        "chat": {**common, "user": "{prompt}"},
        "pair": {**common, "endpoint": "score", "user": "{prompt}"},
        "own": {"kind": "reward_model", "path": str(folder), "timeout_s": 30.0},
        "own_chat": {"kind": "reward_model", "path": str(folder), "timeout_s": 30.0, "user": "{prompt}"},
    }
    outcomes = with_pool(lambda pool: pool.score([RIGHT, WRONG], {"answer": "105"}, "47+58="), parts)
    for outcome, text in zip(outcomes, (RIGHT, WRONG), strict=True):
        ((as_text,), (as_chat,)) = scores_by_transformers(folder, [f"47+58={text}", f"u:47+58=|a:{text}|"])
        found = outcome.parts
        assert (found["text"], found["own"]) == (pytest.approx(as_text, abs=1e-3), pytest.approx(as_text, abs=1e-3))
        assert (found["chat"], found["own_chat"]) == (
            pytest.approx(as_chat, abs=1e-3),
            pytest.approx(as_chat, abs=1e-3),
        )
        assert found["pair"]


def test_a_judge_in_vllm_is_killed_in_the_middle_and_comes_back(serve, tmp_path):
    server = serve(make_tiny_reward_model(tmp_path / "judge", writes=True), "--served-model-name=judge")
    judge = {"kind": "judge", "url": f"{server.url}/v1", "model": "judge", "template": "{prompt}{completion}"}
    judge |= {"timeout_s": 20.0, "retries": 1, "concurrency": 4}
    # A random model writes no scores by itself; vLLM makes it choose one.
    scored = {"temperature": 1.0, "max_tokens": 20, "structured_outputs": {"regex": "score: [0-9]"}}
    unbound = {"temperature": 1.0, "max_tokens": 4}
    completions, payload = [RIGHT] * 16, {"answer": "105"}

    async def work(pool):
        async def score():
            return await pool.score(completions, payload, "47+58=")

        before = await score()
        # Stopped first: requests are under way for certain when it dies.
        os.killpg(server.process.pid, signal.SIGSTOP)
        under_way = asyncio.create_task(score())
        await asyncio.wait([under_way], timeout=1.0)
        server.kill()
        lost = await under_way
        await asyncio.to_thread(server.start)
        after = await score()
        while any(outcome.failed for outcome in after):
            after = await score()
        return before, lost, after

    before, lost, after = with_pool(work, {"judge": {**judge, "options": scored}}, {"exact": 1.0, "judge": 0.5})
    for outcome in [*before, *after]:
        assert outcome.parts["judge"] * 10 in range(10)
        assert outcome.reward == 1.0 + 0.5 * outcome.parts["judge"]
    assert {outcome.reason for outcome in lost} <= {"reward_error", "reward_timeout"}

    outcomes = with_pool(lambda pool: pool.score([RIGHT] * 4, payload), {"judge": {**judge, "options": unbound}})
    assert [outcome.reason for outcome in outcomes] == ["reward_error"] * 4

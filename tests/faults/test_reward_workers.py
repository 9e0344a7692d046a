"""Rewards that use processes, fill their worker, are coroutines or return numbers of other libraries."""

from __future__ import annotations

import asyncio
import textwrap
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asyncrl.errors import RewardError
from asyncrl.rewards.base import Sample
from asyncrl.rewards.kinds.local import UserRule
from asyncrl.rewards.leftovers import is_full
from asyncrl.rewards.pool import RewardPool
from asyncrl.tasks.base import checked_reward

TASK = """
    import asyncio, concurrent.futures, errno, multiprocessing, os, subprocess, sys, threading
    from multiprocessing import shared_memory

    def square(x):
        return float(x * x)

    def write(name):
        block = shared_memory.SharedMemory(name)
        block.buf[0] = 7
        block.close()

    def sleeps():
        import time
        time.sleep(600)

    class Busy:
        train_size = None
        kept = []

        def train_example(self, index): ...
        def eval_examples(self, count): ...

        def reward(self, completion, payload):
            return getattr(self, completion)(**payload)

        def plain(self):
            return {"value": 1.0, "pid": float(os.getpid())}

        def process(self, method):
            context = multiprocessing.get_context(method)
            results = context.Queue()
            child = context.Process(target=results.put, args=(4.0,))
            child.start()
            value = results.get()
            child.join()
            return {"value": value}

        def executor(self, method):
            context = multiprocessing.get_context(method)
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
                return {"value": sum(pool.map(square, [1, 2]))}

        def memory(self):
            block = shared_memory.SharedMemory(create=True, size=64)
            child = multiprocessing.get_context("spawn").Process(target=write, args=(block.name,))
            child.start()
            child.join()
            value = float(block.buf[0])
            block.close()
            block.unlink()
            return {"value": value}

        def script(self):
            code = "import multiprocessing.shared_memory as m; b = m.SharedMemory(create=True, size=8); b.unlink()"
            return {"value": float(subprocess.run([sys.executable, "-c", code]).returncode)}

        def leaves(self, method):
            child = multiprocessing.get_context(method).Process(target=sleeps)
            child.start()
            return {"value": 1.0}

        def keeps_memory(self):
            self.kept.append(bytearray(60 * 2**20))
            return {"value": 1.0, "pid": float(os.getpid())}

        def needs_all_memory(self):
            bytearray(2**40)

        def keeps_files(self):
            while True:
                self.kept.append(open(os.devnull))

        def keeps_threads(self):
            raise RuntimeError("can't start new thread")

        def hides_it(self):
            try:
                return self.keeps_files()
            except OSError as error:
                raise ValueError("no luck") from error

    class Later(Busy):
        async def reward(self, completion, payload):
            loop = asyncio.get_running_loop()
            await asyncio.sleep(0.001)
            if completion == "raises":
                raise KeyError("later")
            if completion == "waits":
                await asyncio.sleep(600)
            self.kept.append(loop)
            return {"value": float(len({id(kept) for kept in self.kept}))}

    async def rule(completion, payload):
        await asyncio.sleep(0)
        return len(completion)
"""


@pytest.fixture(autouse=True)
def busy(tmp_path, monkeypatch):
    (tmp_path / "busy.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)


def score(completions, payload=None, *, task="busy:Busy", timeout_s=20.0, memory_bytes=2**28, parts=None):
    async def run():
        pool = RewardPool(task, {}, 1, timeout_s, memory_bytes, parts=parts)
        try:
            async with asyncio.timeout(60):
                await pool.start()
                return await pool.score(completions, payload or {})
        finally:
            await pool.close()

    return asyncio.run(run())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_D6_processes_that_are_joined_are_no_leftovers_whatever_starts_them(method):
    outcomes = score(["process", "executor", "process"], {"method": method})
    assert [(outcome.parts, outcome.detail) for outcome in outcomes] == [
        ({"value": 4.0}, ""), ({"value": 5.0}, ""), ({"value": 4.0}, ""),
    ]  # fmt: skip


def test_D6_shared_memory_works_and_so_do_scripts_that_use_it():
    outcomes = score(["memory", "script", "memory"])
    assert [(outcome.parts, outcome.detail) for outcome in outcomes] == [
        ({"value": 7.0}, ""), ({"value": 0.0}, ""), ({"value": 7.0}, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_D6_a_process_that_is_left_running_is_ended_and_told_of_also_below_a_fork_server(method):
    (outcome,) = score(["leaves"], {"method": method})
    assert "left processes running" in outcome.detail


def test_D6_a_worker_that_rewards_have_filled_is_replaced_and_costs_no_reward():
    outcomes = score(["keeps_memory"] * 9)
    assert [outcome.detail for outcome in outcomes] == [""] * 9
    assert len({outcome.parts["pid"] for outcome in outcomes}) >= 3


@pytest.mark.parametrize(
    ("completion", "says"),
    [
        ("needs_all_memory", "MemoryError"),
        ("keeps_files", "Too many open files"),
        pytest.param("hides_it", "no luck", marks=pytest.mark.slow),
        pytest.param("keeps_threads", "new thread", marks=pytest.mark.slow),
    ],
)
def test_D6_a_reward_that_fills_a_new_worker_fails_alone_and_the_next_one_has_room_again(completion, says):
    outcomes = score(["plain", completion, completion, "plain"])
    first, *failed, last = outcomes
    assert [says in outcome.detail for outcome in failed] == [True, True]
    assert (first.failed, last.failed) == (False, False)
    assert first.parts["pid"] != last.parts["pid"]


def test_D6_what_says_that_a_process_is_full_is_found_behind_other_errors():
    try:
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            raise ConnectionError("cannot connect") from None
    except ConnectionError as error:
        hidden = error
    assert is_full(hidden) and is_full(ExceptionGroup("all failed", [ValueError(), hidden]))
    assert not is_full(ValueError("24")) and not is_full(FileNotFoundError(2, "no such file"))
    hidden.__cause__ = hidden
    assert is_full(hidden), "a chain that ends in itself ends"


def test_D6_an_async_reward_is_awaited_in_one_event_loop():
    outcomes = score(
        ["good", "raises", "good"], task="busy:Later", parts={"long": {"kind": "rule", "path": "busy:rule"}}
    )
    assert [outcome.parts for outcome in outcomes] == [{"value": 1.0, "long": 4.0}, None, {"value": 1.0, "long": 4.0}]
    assert outcomes[1].detail == "KeyError: 'later'"
    (late,) = score(["waits"], task="busy:Later", timeout_s=1.0)
    assert late.reason == "reward_timeout"


NUMBERS = [
    True, 1, np.bool_(True), np.int64(1), np.float32(1.0), np.float16(1.0), np.array(1.0), np.array(True),
    torch.tensor(1.0), torch.tensor(True), Fraction(1),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_D6_numbers_of_numpy_and_torch_are_taken(number, monkeypatch):
    task = SimpleNamespace(reward=lambda completion, payload: {"x": number})
    (value,) = checked_reward(task, "", {}).values()
    assert type(value) is float and value == 1.0
    monkeypatch.setattr("asyncrl.rewards.kinds.local.find_function", lambda key, path: lambda *args: number)
    assert UserRule(path="a:b").value(Sample("", {})) == 1.0


@pytest.mark.parametrize(
    "value", ["1", None, 1j, np.array([1.0]), np.array([1.0, 2.0]), np.str_("1"), [1.0], np.complex64(1)]
)
def test_D6_what_is_no_number_is_refused(value):
    with pytest.raises(RewardError, match="must be a number"):
        checked_reward(SimpleNamespace(reward=lambda completion, payload: {"x": value}), "", {})

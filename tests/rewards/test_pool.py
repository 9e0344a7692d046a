"""Reward workers: whatever a reward does costs its own rollout and nothing else."""

import asyncio
import os
import select
import subprocess
import sys
import textwrap
import time

import pytest

from asyncrl.errors import RewardError, TaskError
from asyncrl.rewards.pool import RewardPool

TIMEOUT_S = 1.0

UNRULY = """
    import os, subprocess, sys, time

    class Unruly:
        train_size = None

        def __init__(self, notes: str = "."):
            self.notes = notes

        def train_example(self, index): ...
        def eval_examples(self, count): ...

        def reward(self, completion, payload):
            return getattr(self, completion)(**payload)

        def good(self, **payload):
            return {"exact": 1, "format": 0.25}

        def says_whether_torch_is_loaded(self):
            return {"torch": "torch" in sys.modules, "vllm": "vllm" in sys.modules}

        def raises(self):
            raise KeyError("no such answer")

        def returns_nan(self):
            return {"exact": float("nan")}

        def returns_a_list(self):
            return [1.0]

        def calls_sys_exit(self):
            sys.exit(0)

        def ends_the_process(self):
            os._exit(3)

        def segfaults(self):
            os.kill(os.getpid(), 11)

        def fills_memory(self):
            hoard = [bytearray(2**26) for _ in range(1000)]

        def forks_and_returns_twice(self):
            os.fork()
            return {"exact": 1.0}

        def leaves_a_process(self):
            self.note(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
            return {"exact": 1.0}

        def waits_for_its_process(self):
            return {"exact": float(subprocess.run(["true"]).returncode == 0)}

        def prints_and_reads(self):
            print("x" * 100_000)
            return {"exact": float(sys.stdin.read() == "")}

        def floods_the_pipe(self):
            while True:
                for fd in range(3, 20):
                    try:
                        os.write(fd, b"\\xff" * 100)
                    except OSError:
                        pass

        def closes_everything(self):
            os.closerange(3, 100)
            return {"exact": 1.0}

        def hangs(self, **payload):
            self.note(os.getpid())
            time.sleep(600)

        def hangs_with_a_child(self):
            self.note(subprocess.Popen(["sleep", "600"]).pid)
            time.sleep(600)

        def meets(self, fifo, mode):
            with open(fifo, mode):
                return {"exact": 1.0}

        def holds(self, fifo, mode):
            with open(fifo, mode):
                time.sleep(600)

        def note(self, pid):
            with open(self.notes, "a") as file:
                file.write(f"{pid}\\n")
"""


@pytest.fixture
def unruly(tmp_path, monkeypatch):
    """A current directory that holds the task `unruly:Unruly`."""
    (tmp_path / "unruly.py").write_text(textwrap.dedent(UNRULY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_pool(work, *, folder=None, workers=1, timeout_s=TIMEOUT_S, memory_bytes=2**28):
    """Runs `work(pool)` with a started pool; nothing may take longer than a test's patience."""

    async def run():
        args = {"notes": str(folder / "notes")} if folder else {}
        pool = RewardPool("unruly:Unruly", args, workers, timeout_s, memory_bytes)
        try:
            async with asyncio.timeout(30):
                await pool.start()
                return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def score(completions, payload=None, **settings):
    return with_pool(lambda pool: pool.score(completions, payload or {}), **settings)


def noted_pids(folder):
    return [int(line) for line in (folder / "notes").read_text().split()]


def wait_gone(pid, timeout_s=10.0):
    """Waits until the process has ended; fails after timeout_s."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([fd], [], [], timeout_s)
        assert ready, f"process {pid} is still running"
    finally:
        os.close(fd)


def test_parts_come_back_in_order_and_sum_to_the_reward(unruly):
    outcomes = score(["good", "waits_for_its_process", "good"])
    assert [outcome.parts for outcome in outcomes] == [
        {"exact": 1.0, "format": 0.25},
        {"exact": 1.0},
        {"exact": 1.0, "format": 0.25},
    ]
    assert [outcome.reward for outcome in outcomes] == [1.25, 1.0, 1.25]
    assert not any(outcome.failed for outcome in outcomes)


@pytest.mark.parametrize(
    ("completion", "detail"),
    [
        ("raises", "KeyError: 'no such answer'"),
        ("returns_nan", "must be finite"),
        ("returns_a_list", "must return a dict"),
        ("calls_sys_exit", "SystemExit: 0"),
        ("ends_the_process", "ended its process with exit code 3"),
        ("segfaults", "ended by SIGSEGV"),
        ("fills_memory", "MemoryError"),
        ("leaves_a_process", "left processes running"),
        ("floods_the_pipe", "pipe"),
        ("not_a_method", "AttributeError"),
    ],
)
def test_an_unruly_reward_fails_alone(unruly, completion, detail):
    before, failed, after = score(["good", completion, "good"], folder=unruly)
    assert before.parts == after.parts == {"exact": 1.0, "format": 0.25}
    assert failed.failed and failed.reason == "reward_error"
    assert detail in failed.detail
    with pytest.raises(RewardError, match="reward_error"):
        failed.reward  # noqa: B018 - reading it is the point


def test_a_failure_of_the_pipe_itself_is_contained(unruly):
    first, failed, after = score(["good", "closes_everything", "good"])
    assert not first.failed and not after.failed
    assert failed.reason == "reward_error"


def test_a_hanging_reward_is_killed_at_its_deadline_and_the_rest_is_scored(unruly):
    started = time.monotonic()
    outcomes = score(["good", "hangs", "good", "hangs", "good"], folder=unruly, timeout_s=0.5)
    assert [outcome.reason for outcome in outcomes] == ["", "reward_timeout", "", "reward_timeout", ""]
    assert "no reward within 0.5 s" in outcomes[1].detail
    assert time.monotonic() - started < 15
    for pid in noted_pids(unruly):
        wait_gone(pid)


def test_children_of_a_hanging_reward_die_with_it(unruly):
    (outcome,) = score(["hangs_with_a_child"], folder=unruly, timeout_s=0.5)
    assert outcome.reason == "reward_timeout"
    (child,) = noted_pids(unruly)
    wait_gone(child)


def test_processes_left_behind_are_ended_even_in_a_session_of_their_own(unruly):
    score(["leaves_a_process"], folder=unruly)
    (child,) = noted_pids(unruly)
    wait_gone(child)


def test_a_fork_that_returns_answers_once(unruly):
    outcomes = score(["forks_and_returns_twice", "good", "good"])
    assert len(outcomes) == 3
    assert outcomes[1].parts == outcomes[2].parts == {"exact": 1.0, "format": 0.25}


def test_printing_and_reading_do_not_reach_the_pipes(unruly):
    outcomes = score(["prints_and_reads", "good"])
    assert [outcome.parts for outcome in outcomes] == [{"exact": 1.0}, {"exact": 1.0, "format": 0.25}]


def test_workers_import_neither_torch_nor_vllm(unruly):
    (outcome,) = score(["says_whether_torch_is_loaded"])
    assert outcome.parts == {"torch": 0.0, "vllm": 0.0}


def test_workers_score_at_the_same_time(unruly):
    """Each reward opens one end of a pipe, which waits for the other end."""
    fifo = str(unruly / "fifo")
    os.mkfifo(fifo)

    async def meet(pool):
        return await asyncio.gather(*(pool.score(["meets"], {"fifo": fifo, "mode": mode}) for mode in ("r", "w")))

    together = with_pool(meet, workers=2, timeout_s=10.0)
    assert [outcome.failed for (outcome,) in together] == [False, False]


def test_more_groups_than_workers_wait_their_turn(unruly):
    async def many(pool):
        return await asyncio.gather(*(pool.score(["good"] * 3, {"text": "x" * 200_000}) for _ in range(20)))

    groups = with_pool(many, workers=2)
    assert [len(group) for group in groups] == [3] * 20
    assert not any(outcome.failed for group in groups for outcome in group)


def test_a_cancelled_group_frees_its_worker(unruly):
    os.mkfifo(unruly / "notes")

    async def work(pool):
        scoring = asyncio.create_task(pool.score(["hangs"], {}))
        (pid,) = await asyncio.to_thread(noted_pids, unruly)  # waits until the reward has written to the pipe
        scoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scoring
        return pid, await pool.score(["good"], {})

    pid, (outcome,) = with_pool(work, folder=unruly, timeout_s=20.0)
    assert not outcome.failed
    wait_gone(pid)


def test_a_worker_that_died_between_jobs_costs_no_rollout(unruly):
    async def work(pool):
        (outcome,) = await pool.score(["meets"], {"fifo": os.devnull, "mode": "r"})
        assert not outcome.failed
        process = pool._workers[0].process
        process.kill()
        await process.wait()
        return await pool.score(["good"], {})

    (outcome,) = with_pool(work)
    assert not outcome.failed


def test_closing_ends_busy_workers_and_starts_no_new_ones(unruly):
    fifo = str(unruly / "fifo")
    os.mkfifo(fifo)

    async def work(pool):
        scoring = asyncio.create_task(pool.score(["holds", "good"], {"fifo": fifo, "mode": "w"}))
        with await asyncio.to_thread(open, fifo, "rb"):  # returns once the worker is at its job
            await pool.close()
        return await scoring, pool

    outcomes, pool = with_pool(work, timeout_s=20.0)
    assert [outcome.reason for outcome in outcomes] == ["reward_error"] * 2
    assert [worker.process for worker in pool._workers] == [None]


@pytest.mark.parametrize(
    ("path", "args", "says"),
    [
        ("unruly:Missing", {}, "has no class Missing"),
        ("unruly:Unruly", {"note": 1}, "Unruly takes notes"),
    ],
)
def test_a_task_that_cannot_be_made_is_reported_at_start(unruly, path, args, says):
    async def start():
        pool = RewardPool(path, args, 2, TIMEOUT_S)
        try:
            await pool.start()
        finally:
            await pool.close()

    with pytest.raises(TaskError, match=says):
        asyncio.run(start())


def test_workers_die_with_a_killed_daemon_even_in_the_middle_of_a_reward(unruly):
    program = """
        import asyncio
        from asyncrl.rewards.pool import RewardPool

        async def main():
            pool = RewardPool("unruly:Unruly", {"notes": "notes"}, 1, 600.0)
            await pool.start()
            await pool.score(["hangs"], {})

        asyncio.run(main())
    """
    os.mkfifo(unruly / "notes")
    daemon = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    try:
        (worker,) = noted_pids(unruly)  # waits until the reward has written to the pipe
    finally:
        daemon.kill()
        daemon.wait(10)
    wait_gone(worker)

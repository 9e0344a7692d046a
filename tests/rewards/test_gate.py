"""What a server that is down holds back, and how it is tried again."""

import asyncio
import time

from asyncrl.rewards.gate import ServerGate


async def job(gate, up):
    """One job; returns when it was let through."""
    async with gate.passing() as passage:
        passed_at = time.monotonic()
        await asyncio.sleep(0)
        passage.answered() if up() else passage.unanswered("nobody there")
    return passed_at


def run(scenario):
    async def bounded():
        async with asyncio.timeout(20):
            return await scenario(ServerGate(first_pause_s=0.05, max_pause_s=0.2))

    return asyncio.run(bounded())


def test_pauses_between_trials_double_up_to_a_limit():
    async def scenario(gate):
        return [(await job(gate, lambda: False), gate._pause_s) for _ in range(6)]

    times, next_pauses = zip(*run(scenario), strict=True)
    assert next_pauses == (0.1, 0.2, 0.2, 0.2, 0.2, 0.2)
    for before, after, pause in zip(times, times[1:], (0.05, *next_pauses), strict=False):
        assert after - before >= pause


def test_jobs_that_were_out_already_when_it_closed_make_no_pause_longer():
    async def scenario(gate):
        await asyncio.gather(*(job(gate, lambda: False) for _ in range(50)))
        return gate._pause_s

    assert run(scenario) == 0.1


def test_one_success_lets_all_through_at_once():
    async def scenario(gate):
        await job(gate, lambda: False)
        started = time.monotonic()
        await asyncio.gather(*(job(gate, lambda: True) for _ in range(100)))
        return time.monotonic() - started, gate._pause_s

    took_s, pause_s = run(scenario)
    assert 0.05 <= took_s < 100 * 0.05, "one after the other they would take as many pauses"
    assert pause_s == 0.05


def test_who_gives_up_while_trying_or_waiting_leaves_the_turn_to_the_next():
    async def scenario(gate):
        await job(gate, lambda: False)
        waiting = [asyncio.create_task(job(gate, lambda: True)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, second, third = run(scenario)
    assert isinstance(first, asyncio.CancelledError) and isinstance(second, asyncio.CancelledError)
    assert isinstance(third, float)

"""The generator's part in a weight sync: phases answered in order, no token out before its version is proven."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np
import pytest
import torch

from asyncrl.errors import ChannelError, EngineError
from asyncrl.generator.weight_phases import WeightSync
from asyncrl.link.messages import SyncAbort, SyncCommit, SyncOffer, SyncSwap
from asyncrl.link.weight_records import ChannelPlace
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.generator.fake_engine import FakeEngine, dead
from tests.waits import LATE_S

TIMEOUT_S = 5.0


def manifest(version):
    buffer = SnapshotBuffer([("weight", torch.nn.Parameter(torch.ones(4)))], bucket_bytes=1024)
    buffer.snapshot()
    return buffer.manifest(version)


def offer(version, epoch=1, attempt=0, run_epoch=1):
    channel = ChannelPlace(epoch, "127.0.0.1", 1, f"run/{run_epoch}/{epoch}", rank=1, world_size=2, backend="gloo")
    return SyncOffer(run_epoch, version, attempt, channel, manifest(version), TIMEOUT_S)


def swap(version, attempt=0):
    return SyncSwap(1, version, attempt, [np.arange(5, dtype=TOKEN_DTYPE).tobytes()], TIMEOUT_S)


class World:
    """One WeightSync and what it answered."""

    def __init__(self):
        self.engine = FakeEngine()
        self.replies = []
        self.sync = WeightSync(self.engine, self.replies.append)

    async def handle(self, *messages):
        """Hands over messages and returns the last answer once all are worked off."""
        for message in messages:
            self.sync.handle(message)
        deadline = time.monotonic() + TIMEOUT_S
        while self.sync._task is not None and not self.sync._task.done():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        return self.replies[-1] if self.replies else None

    async def load(self, version, commit=True):
        await self.handle(offer(version))
        await self.handle(swap(version))
        if commit:
            await self.handle(SyncCommit(1, version, 0))

    def names(self):
        return [name for name, _ in self.engine.calls]


def scenario(work):
    """Runs a coroutine that takes a fresh world."""

    async def run():
        world = World()
        try:
            return await work(world)
        finally:
            await world.sync.close(TIMEOUT_S)

    return asyncio.run(run())


def test_an_offer_is_staged_and_answered_with_the_digests():
    async def work(world):
        reply = await world.handle(offer(3, attempt=2))
        assert world.engine.calls == [("leave", None), ("join", "run/1/1"), ("stage", 3)]
        assert (reply.version, reply.attempt, reply.phase, reply.error) == (3, 2, "stage", "")
        assert (reply.digests, reply.timings_ms) == ([[11, 22]], {"stage_ms": 1.0})
        assert world.sync.held_version is None

    scenario(work)


def test_a_channel_that_is_open_is_used_again():
    async def work(world):
        await world.handle(offer(1, epoch=1))
        await world.handle(offer(2, epoch=1))
        assert world.names() == ["leave", "join", "stage", "stage"]
        await world.handle(offer(3, epoch=2))
        assert world.names()[4:] == ["leave", "join", "stage"]

    scenario(work)


def test_after_a_failed_stage_the_channel_is_joined_anew_and_the_held_version_stays():
    async def work(world):
        await world.load(1)
        world.engine.fail["stage"] = ChannelError("rank 0 is gone")
        reply = await world.handle(offer(2))
        assert reply.error == "ChannelError: rank 0 is gone"
        assert world.sync.held_version == 1
        world.engine.fail.clear()
        world.engine.calls.clear()
        await world.handle(offer(2, attempt=1))
        assert world.names() == ["leave", "join", "stage"]

    scenario(work)


def test_a_swap_is_answered_with_the_canary_and_held_only_after_the_commit():
    async def work(world):
        await world.load(1)
        await world.handle(offer(2))
        reply = await world.handle(swap(2))
        assert (reply.phase, reply.error) == ("swap", "")
        (scores,) = (np.frombuffer(row, LOGPROB_DTYPE) for row in reply.canary_logprobs)
        assert scores.tolist() == [-0.5] * 4
        assert set(reply.timings_ms) == {"pause_ms", "apply_ms", "canary_ms", "check_ms"}
        assert world.sync.held_version is None
        await world.handle(SyncCommit(1, 2, 0))
        assert world.sync.held_version == 2

    scenario(work)


@pytest.mark.parametrize("method", ["swap", "score"])
def test_after_a_failed_swap_or_canary_no_version_is_held(method):
    async def work(world):
        await world.load(1)
        world.engine.fail[method] = dead()
        await world.handle(offer(2))
        reply = await world.handle(swap(2))
        assert reply.phase == "swap" and "EngineError: the engine died" in reply.error
        assert world.sync.held_version is None
        # A swap that fails taints the engine by itself; weights that cannot be scored are in use.
        assert world.engine.tainted == (method == "score")
        assert ("canary" in reply.error and "tainted until a full sync" in reply.error) == (method == "score")

    scenario(work)


def test_a_commit_of_what_is_not_loaded_is_ignored():
    async def work(world):
        await world.load(1, commit=False)
        await world.handle(SyncCommit(1, 2, 0))
        assert world.sync.held_version is None
        with pytest.raises(EngineError):
            await world.sync.wait_proven({2}, 0.01, since=0)

    scenario(work)


def test_phases_that_arrive_together_are_worked_off_in_order():
    async def work(world):
        await world.handle(offer(1), swap(1), SyncCommit(1, 1, 0))
        assert world.names() == ["leave", "join", "stage", "swap", "score", "check"]
        assert world.sync.held_version == 1

    scenario(work)


# -- proofs


def test_tokens_wait_for_the_commit_of_what_is_loaded_and_go_then():
    async def work(world):
        await world.load(1)
        await world.load(2, commit=False)
        waiting = asyncio.create_task(world.sync.wait_proven({1, 2}, TIMEOUT_S, since=0))
        await asyncio.sleep(0)
        assert not waiting.done()
        await world.handle(SyncCommit(1, 2, 0))
        await waiting

    scenario(work)


def test_tokens_of_a_tainted_version_are_never_proven():
    async def work(world):
        await world.load(1)
        await world.load(2, commit=False)
        waiting = asyncio.create_task(world.sync.wait_proven({2}, TIMEOUT_S, since=0))
        await world.handle(SyncAbort(1, 2, 0, "canary differs", True))
        with pytest.raises(EngineError, match=r"versions \[2\], which were never proven"):
            await waiting
        assert world.sync.held_version is None

    scenario(work)


def test_an_engine_whose_weights_were_found_wrong_is_tainted_until_the_next_swap():
    async def work(world):
        await world.load(1)
        await world.load(2, commit=False)
        await world.handle(SyncAbort(1, 2, 0, "canary log-probs differ by 0.3", True))
        assert world.engine.tainted
        assert world.engine.calls[-1] == ("taint", "version 2 was not proven: canary log-probs differ by 0.3")
        await world.load(2)
        assert not world.engine.tainted and world.sync.held_version == 2

    scenario(work)


def test_a_number_that_was_proven_proves_nothing_when_other_weights_come_under_it():
    """A learner that resumed trains the versions after its checkpoint again; their weights need not be the same."""

    async def work(world):
        await world.load(3)
        await world.load(3, commit=False)
        with pytest.raises(EngineError, match=r"versions \[3\] were not proven"):
            await world.sync.wait_proven({3}, 0.01, since=0)

    scenario(work)


@pytest.mark.parametrize("in_between", ["tainted", "the learner died", "proven"])
def test_the_proof_of_a_number_that_came_again_is_not_one_of_what_was_sampled_before(in_between):
    """A group may be complete and wait for its rewards while its version is found wrong, sent again and proven."""

    async def work(world):
        await world.load(1)
        before = world.sync.num_loads
        await world.load(2, commit=in_between == "proven")
        sampled = asyncio.create_task(world.sync.wait_proven({2}, TIMEOUT_S, since=before))
        later = world.sync.num_loads
        if in_between == "tainted":
            await world.handle(SyncAbort(1, 2, 0, "canary differs", True))
            with pytest.raises(EngineError, match="never proven"):
                await sampled
        await world.load(2)
        if in_between != "tainted":
            with (
                pytest.raises(EngineError, match="from before these were loaded again")
                if (in_between == "the learner died")
                else contextlib.nullcontext()
            ):
                await sampled  # when it was proven, it had gone before the number came again
        for mark in (before, later):
            with pytest.raises(EngineError, match=r"versions \[2\] from before these were loaded again"):
                await world.sync.wait_proven({1, 2}, 0.01, since=mark)
        await world.sync.wait_proven({1, 2}, 0.01, since=world.sync.num_loads)
        assert world.sync.held_version == 2

    scenario(work)


def test_the_commit_of_an_earlier_attempt_proves_nothing_about_a_later_load():
    async def work(world):
        await world.load(2, commit=False)
        await world.handle(offer(2, epoch=2, attempt=1), swap(2, attempt=1))
        for commit in (SyncCommit(1, 2, 0), SyncCommit(2, 2, 1)):
            await world.handle(commit)
            assert world.sync.held_version is None
        await world.handle(SyncCommit(1, 2, 1))
        assert world.sync.held_version == 2

    scenario(work)


def test_what_begins_to_sample_during_a_swap_may_have_old_weights_and_counts_as_before_it():
    async def work(world):
        await world.load(2)
        world.engine.swap_held_up = asyncio.Event()
        world.sync.handle(offer(2, epoch=2))
        world.sync.handle(swap(2))
        while world.names()[-1] != "swap":
            await asyncio.sleep(0)
        assert world.sync.swapping
        mark = world.sync.num_loads
        world.engine.swap_held_up.set()
        await world.handle(SyncCommit(1, 2, 0))
        assert world.sync.held_version == 2 and not world.sync.swapping
        with pytest.raises(EngineError, match="loaded again"):
            await world.sync.wait_proven({2}, 0.01, since=mark)

    scenario(work)


def test_joining_and_staging_share_one_deadline():
    async def work(world):
        given = []
        join, stage = world.engine.join_channel, world.engine.stage_weights

        async def slow_join(spec, timeout_s):
            given.append(timeout_s)
            await join(spec, timeout_s)
            await asyncio.sleep(0.05)

        async def noted_stage(manifest, timeout_s):
            given.append(timeout_s)
            return await stage(manifest, timeout_s)

        world.engine.join_channel, world.engine.stage_weights = slow_join, noted_stage
        await world.handle(offer(1))
        assert given[0] <= TIMEOUT_S and given[1] <= given[0] - 0.05

    scenario(work)


def test_an_abort_that_changed_no_weights_leaves_the_held_version():
    async def work(world):
        await world.load(1)
        await world.handle(offer(2))
        await world.handle(SyncAbort(1, 2, 0, "another generator died", False))
        assert world.sync.held_version == 1 and not world.engine.tainted
        await world.sync.wait_proven({1}, 0.01, since=0)

    scenario(work)


def test_a_version_stays_proven_after_the_next_one():
    """A group begun under 1 and finished under 2 needs both."""

    async def work(world):
        await world.load(1)
        await world.load(2)
        await world.sync.wait_proven({1, 2}, 0.01, since=0)

    scenario(work)


def test_the_wait_for_a_learner_that_died_between_swap_and_commit_ends():
    async def work(world):
        await world.load(1, commit=False)
        with pytest.raises(EngineError, match=r"versions \[1\] were not proven within 0 s"):
            await world.sync.wait_proven({1}, 0.05, since=0)

    scenario(work)


def test_a_version_that_was_never_loaded_fails_at_once():
    async def work(world):
        await world.load(1)
        started = time.monotonic()
        with pytest.raises(EngineError, match="never proven"):
            await world.sync.wait_proven({7}, 60.0, since=0)
        assert time.monotonic() - started < LATE_S

    scenario(work)


# -- learners and members that went away


def test_the_channels_of_a_new_learner_are_joined_anew_whatever_their_numbers():
    """A restarted learner counts its channels from 1 again."""

    async def work(world):
        await world.handle(offer(1, epoch=1, run_epoch=1))
        world.engine.calls.clear()
        await world.handle(offer(1, epoch=1, run_epoch=2))
        assert world.engine.calls == [("leave", None), ("join", "run/2/1"), ("stage", 1)]

    scenario(work)


@pytest.mark.parametrize("news", ["offer", "abort"])
def test_a_stage_that_the_learner_has_given_up_holds_up_nothing(news):
    async def work(world):
        world.engine.stage_held_up = asyncio.Event()  # for ever: a member is gone
        world.sync.handle(offer(1))
        while "stage" not in world.names():
            await asyncio.sleep(0)
        world.engine.stage_held_up, world.replies[:] = None, []
        reply = await world.handle(offer(2, epoch=2) if news == "offer" else SyncAbort(1, 1, 0, "too late", False))
        assert (reply and (reply.version, reply.error)) == ((2, "") if news == "offer" else None)
        await world.handle(swap(2))
        assert world.replies[-1].error == ""

    scenario(work)


def test_news_that_come_together_end_the_stage_at_work_skip_the_one_that_waits_and_carry_out_the_abort():
    async def work(world):
        await world.load(1, commit=False)
        world.engine.stage_held_up = asyncio.Event()
        world.sync.handle(offer(2))
        while world.names().count("stage") < 2:
            await asyncio.sleep(0)
        world.engine.stage_held_up, world.replies[:], world.engine.calls[:] = None, [], []
        wrong = SyncAbort(1, 1, 0, "the canary was wrong", True)
        await world.handle(wrong, offer(3, epoch=3), offer(4, epoch=4))
        assert world.names() == ["taint", "leave", "join", "stage"]
        assert [(reply.version, reply.error) for reply in world.replies] == [(4, "")]

    scenario(work)


def test_a_swap_is_never_broken_off():
    async def work(world):
        await world.handle(offer(1))
        world.engine.swap_held_up = asyncio.Event()
        world.sync.handle(swap(1))
        while "swap" not in world.names():
            await asyncio.sleep(0)
        world.sync.handle(SyncAbort(1, 1, 0, "no answer to the swap within the deadline", True))
        world.engine.swap_held_up.set()
        await world.handle()
        assert [reply.error for reply in world.replies] == ["", ""]
        assert world.sync.held_version is None

    scenario(work)

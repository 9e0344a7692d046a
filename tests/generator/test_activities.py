"""What a generator's time is counted for: one activity, by the order of their declaration."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import fields

import pytest

from asyncrl.config import Config
from asyncrl.generator.activities import Situation, activity_of, busy_s, idle_s
from asyncrl.generator.daemon import GeneratorDaemon, GeneratorParts
from asyncrl.link import messages
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.metrics.ledger import GeneratorActivity, Ledger
from asyncrl.rewards.pool import RewardOutcome
from asyncrl.types import LeaseKind
from tests.desk.desk_parts import hello
from tests.generator.fake_engine import FakeEngine, completion
from tests.generator.test_lease_runner import lease
from tests.metrics.test_ledger import FakeClock

NAMES = [field.name for field in fields(Situation)]


def holds(activity, now):
    """Whether an activity could be told of this situation, on its own."""
    return {
        "start": not now.ready,
        "swap": now.swapping,
        "decode": now.training,
        "eval": now.evaluating,
        "rewards": now.scoring,
        "weights": now.in_hand or not (now.held or now.stopping),
        "room": now.blocked,
        "other": now.stopping,
        "leases": True,
    }[activity]


@pytest.mark.parametrize("first", [False, True])
def test_of_all_that_hold_the_first_in_the_order_of_declaration_counts(first):
    for values in itertools.product([False, True], repeat=len(NAMES) - 1):
        now = Situation(**dict(zip(NAMES, (first, *values), strict=True)))
        assert activity_of(now) == [activity for activity in GeneratorActivity if holds(activity, now)][0], now


def test_busy_and_idle_are_all_time_but_the_start():
    seconds = {activity.value: 0.1 * number for number, activity in enumerate(GeneratorActivity, start=1)}
    assert busy_s(seconds) + idle_s(seconds) + seconds["start"] == pytest.approx(sum(seconds.values()))
    assert busy_s(seconds) == pytest.approx(seconds["swap"] + seconds["decode"] + seconds["eval"])
    assert idle_s({"start": 0.1, "swap": 0.2, "decode": 0.3}) == 0.0, "rounding makes it no negative time"


# -- the daemon's events


class Socket:
    """Takes frames, and brings none."""

    connects, disconnects, address, link = 1, 0, "nowhere", "up"

    def __init__(self):
        self.sent = []

    def send(self, frame):
        self.sent.append(frame)

    def send_message(self, message):
        self.sent.append(message)
        return True


class Rewards:
    """One reward for each completion, when the test says so."""

    def __init__(self):
        self.held_up = asyncio.Event()

    async def score(self, completions, payload, prompt, num_tokens):
        await self.held_up.wait()
        return [RewardOutcome({"exact": 1.0})] * len(completions)


class World:
    """A daemon whose loops do not run: the test brings each event, and says how long it is until the next."""

    def __init__(self, outbox_bytes=2**20):
        config = Config()
        config.sampling.group_size = 2
        session = GeneratorSession(
            hello("g"), run_name=config.run.name, outbox_bytes=outbox_bytes,
            max_frame_bytes=config.transport.max_frame_bytes, now=0.0,
        )  # fmt: skip
        self.clock = FakeClock()
        self.engine, self.rewards = FakeEngine(), Rewards()
        self.engine.held_up, self.engine.swap_held_up = asyncio.Event(), asyncio.Event()
        self.daemon = GeneratorDaemon(config, session, Socket(), self.engine, self.rewards, parts=GeneratorParts())
        self.daemon.ledger = Ledger(GeneratorActivity.START, clock=self.clock)

    @property
    def activity(self):
        return self.daemon.ledger.activity

    async def until(self, activity):
        async with asyncio.timeout(10):
            while self.activity != activity:
                await asyncio.sleep(0)

    def is_ready(self):
        self.daemon._ready = True
        self.daemon._account()

    async def loads(self, version=0):
        """Weights are swapped in and proven."""
        self.daemon._handle(messages.SyncSwap(1, version, 0, [], 30.0))
        await self.until("swap")
        self.clock.now += 1.0
        self.engine.swap_held_up.set()
        await self.until("weights" if not self.daemon.leases else "decode")
        self.engine.swap_held_up.clear()
        self.clock.now += 2.0
        self.commits(version)

    def commits(self, version):
        self.daemon._handle(messages.SyncCommit(1, version, 0))

    def take(self, **changes):
        a_lease = lease(num_rollouts=2, **changes)
        self.daemon.leases.take(a_lease)
        return a_lease


def in_a_loop(story, **how):
    async def run():
        world = World(**how)
        await story(world)
        await world.daemon.leases.give_back_all("the test is over")
        assert sum(world.daemon.ledger.seconds().values()) == pytest.approx(world.daemon.ledger.elapsed_s)
        return world.daemon.ledger.seconds()

    return asyncio.run(run())


async def work_through(world, *, decode_s, rewards_s, then="leases"):
    """All sequences end after decode_s, and get their rewards after rewards_s."""
    while not world.engine.requests:
        await asyncio.sleep(0)
    world.clock.now += decode_s
    for _ in range(2):
        world.engine.requests[-1].on_sequence_end()
    assert world.activity == "rewards"
    world.clock.now += rewards_s
    world.engine.held_up.set()
    world.rewards.held_up.set()
    await world.until(then)


def test_one_lease_from_the_start_of_the_engine_to_the_wait_for_the_next():
    async def story(world):
        world.clock.now += 3.0
        world.is_ready()
        world.clock.now += 0.5
        assert world.activity == "weights"
        await world.loads()
        await world.until("leases")
        world.clock.now += 4.0
        world.take()
        assert world.activity == "decode"
        await work_through(world, decode_s=5.0, rewards_s=6.0)
        world.clock.now += 7.0

    seconds = in_a_loop(story)
    expected = {"start": 3.0, "weights": 2.5, "swap": 1.0, "leases": 11.0, "decode": 5.0, "rewards": 6.0}
    assert seconds == pytest.approx(expected)


def test_a_swap_interrupts_decoding_and_nothing_else_does():
    async def story(world):
        world.is_ready()
        await world.loads(0)
        await world.until("leases")
        world.take()
        world.clock.now += 5.0
        await world.loads(1)  # 1 s in the swap, then 2 s until the commit, in which it decodes
        assert world.activity == "decode"
        world.clock.now += 6.0

    assert in_a_loop(story) == pytest.approx({"swap": 2.0, "weights": 2.0, "decode": 13.0})


def test_groups_that_have_their_rewards_wait_for_the_proof_of_their_version():
    async def story(world):
        world.is_ready()
        await world.loads(0)
        await world.until("leases")
        world.engine.sample = lambda request: [completion(spans=((0, 2, 1),))] * request.num_rollouts
        world.take()
        world.commits = lambda version: None
        await world.loads(1)
        await work_through(world, decode_s=5.0, rewards_s=6.0, then="weights")
        world.clock.now += 8.0
        del world.commits
        world.commits(1)
        await world.until("leases")

    assert in_a_loop(story) == pytest.approx({"swap": 2.0, "weights": 10.0, "decode": 7.0, "rewards": 6.0})


def test_an_engine_with_sequences_of_evaluations_alone_evaluates():
    async def story(world):
        world.is_ready()
        await world.loads()
        await world.until("leases")
        world.take(kind=LeaseKind.EVAL)
        world.clock.now += 5.0
        assert world.activity == "eval"

    assert in_a_loop(story)["eval"] == pytest.approx(5.0)


def test_a_full_outbox_is_waited_for_and_not_leases():
    async def story(world):
        world.is_ready()
        await world.loads()
        await world.until("leases")
        world.take()
        await work_through(world, decode_s=1.0, rewards_s=1.0, then="room")
        world.clock.now += 9.0

    assert in_a_loop(story, outbox_bytes=1)["room"] == pytest.approx(9.0)


def test_a_generator_that_stops_and_has_nothing_in_hand_waits_for_no_lease():
    async def story(world):
        world.is_ready()
        await world.loads()
        await world.until("leases")
        world.daemon.stop("signal")
        world.clock.now += 2.0

    assert in_a_loop(story)["other"] == pytest.approx(2.0)


def test_a_beat_tells_all_of_the_time():
    async def story(world):
        world.clock.now += 3.0
        world.is_ready()
        world.clock.now += 2.0
        beat = world.daemon._beat()
        assert (beat.time_s, beat.busy_s, beat.idle_s) == ({"start": 3.0, "weights": 2.0}, 0.0, 2.0)

    in_a_loop(story)

"""A learner that was away is greeted as soon as it listens again, and not when some timer ends."""

from __future__ import annotations

import asyncio
import time

import pytest
import zmq

from asyncrl.host.addresses import parse_address
from asyncrl.link import limits
from asyncrl.link.socket_options import LinkMonitor, set_options
from tests.faults.test_addresses import Generator, Learner, config_with, tcp
from tests.waits import LATE_S

NEVER_S = 1000.0


@pytest.fixture
def no_timer_ends(monkeypatch):
    """What remains is the connection itself."""
    monkeypatch.setattr(limits, "BEAT_S", NEVER_S)
    monkeypatch.setattr(limits, "SUSPECT_S", 2 * NEVER_S)
    monkeypatch.setattr("asyncrl.generator.learner_link.RECEIVE_WAIT_S", NEVER_S)


async def until_welcome_of(learner, generator, run_epoch):
    """The generator's loop in a task of its own, which may wait for as long as it likes."""
    session = generator.link.session

    async def loop():
        while True:
            await generator.turn()

    task = asyncio.create_task(loop())
    async with asyncio.timeout(4 * LATE_S):
        while not (session.welcomed and session.run_epoch == run_epoch):
            learner.serve()
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_new_connection_ends_the_wait_and_is_greeted_at_once(tmp_path, no_timer_ends):
    address = tcp()

    async def run():
        generator = Generator(config_with(tmp_path, address))
        generator.link.keep_up(None)  # the first hello is lost: nobody listens
        for run_epoch in (1, 2, 3):
            learner = Learner(tmp_path / str(run_epoch), address, run_epoch)
            await until_welcome_of(learner, generator, run_epoch)
            learner.close()
        await generator.link.close()

    asyncio.run(run())


def test_a_connection_between_the_look_and_the_wait_ends_the_wait(tmp_path, no_timer_ends):
    """The wait begins with a look at the monitor, which takes away the event that would end it."""
    address = tcp()

    async def run():
        generator = Generator(config_with(tmp_path, address))
        generator.link.keep_up(None)  # before there is a learner
        learner = Learner(tmp_path / "1", address, 1)
        while not generator.client.connects:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(LATE_S):
            assert await generator.link.receive() == []
        learner.close()
        await generator.link.close()

    asyncio.run(run())


def test_a_socket_tries_as_often_when_the_learner_is_away_for_long():
    """Where the pause doubles up to a second, twelve tries take more than nine seconds; a learner starts within one."""
    where = parse_address(tcp())
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    set_options(socket, where, 1000)
    link = LinkMonitor(context, socket, zmq.EVENT_CONNECT_RETRIED)
    started = time.monotonic()
    socket.connect(where.text)
    while link.count(zmq.EVENT_CONNECT_RETRIED) < 12:
        link.pair.poll(1000)
    took_s = time.monotonic() - started
    link.close()
    context.destroy(linger=0)
    assert took_s < 9

"""An engine that no longer works is found, with leases and without; one that stands still for a swap is left alone."""

from __future__ import annotations

import asyncio

import pytest

from asyncrl.errors import DeadlineExceeded, EngineError
from asyncrl.generator.engines.watch import watch_engine


class Engine:
    tokens_generated = 0

    def __init__(self, error=None, before_it=lambda: None):
        self.probes, self.error, self.before_it = 0, error, before_it

    async def probe(self, timeout_s):
        self.probes += 1
        self.before_it()
        if self.error:
            raise self.error


class Sync:
    swapping = False
    num_loads = 0


def watch(engine, sync, until):
    """Watches until the watch raises or `until()`."""

    async def scenario():
        task = asyncio.create_task(watch_engine(engine, sync, probe_every_s=0.001))
        async with asyncio.timeout(10.0):
            while not task.done() and not until():
                await asyncio.sleep(0.001)
        if not task.done():
            task.cancel()
            return
        await task

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [DeadlineExceeded("nothing within 5 s"), EngineError("it died")])
def test_an_engine_that_does_not_answer_ends_the_watch(error):
    engine = Engine(error)
    with pytest.raises(type(error)):
        watch(engine, Sync(), until=lambda: engine.probes > 3)
    assert engine.probes == 1


def test_an_engine_that_finishes_sequences_is_not_probed_and_one_that_does_not_is():
    class Working(Engine):
        looked = 0

        @property
        def tokens_generated(self):
            self.looked += 1
            return min(self.looked, 40)

    engine = Working()
    watch(engine, Sync(), until=lambda: engine.probes)
    assert engine.looked >= 40


@pytest.mark.parametrize("change", [("swapping", True), ("num_loads", 1)])
def test_a_probe_that_a_swap_held_up_says_nothing(change):
    sync = Sync()
    engine = Engine(DeadlineExceeded("nothing within 5 s"), before_it=lambda: setattr(sync, *change))
    watch(engine, sync, until=lambda: engine.probes == 1)
    assert engine.probes == 1


def test_no_probe_begins_while_the_engine_stands_still_for_a_swap():
    sync, engine, looks = Sync(), Engine(), []
    sync.swapping = True
    watch(engine, sync, until=lambda: looks.append(0) or len(looks) > 50)
    assert engine.probes == 0

"""Sessions over a network that loses, repeats and reorders, with both ends crashing at any moment.

Nothing acknowledged is lost, nothing is accepted twice, memory is bounded, and after the network healed everything
has arrived. The last test breaks one rule at a time and expects this file to notice.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncrl.errors import ProtocolError
from tests.link.session_world import Desk, World, refused_by_rule, simulate


class Link(RuleBasedStateMachine):
    """The world under Hypothesis, which shrinks what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule()
    def finish_a_lease(self) -> None:
        self.world.finish_a_lease()

    @rule(passed_s=st.sampled_from([0.0, 0.1, 0.6, 1.0, 5.0]))
    def generator_turn(self, passed_s: float) -> None:
        self.world.generator_turn(passed_s)

    @rule()
    def calm(self) -> None:
        self.world.calm()

    @precondition(lambda self: self.world.to_desk.items)
    @rule(place=st.integers(0, 1000), repeat=st.booleans())
    def deliver_to_desk(self, place: int, repeat: bool) -> None:
        queue = self.world.to_desk
        self.world.deliver(queue, place % len(queue.items), repeat)

    @precondition(lambda self: self.world.to_generator.items)
    @rule(place=st.integers(0, 1000), repeat=st.booleans())
    def deliver_to_generator(self, place: int, repeat: bool) -> None:
        queue = self.world.to_generator
        self.world.deliver(queue, place % len(queue.items), repeat)

    @rule(place=st.integers(0, 1000), towards_desk=st.booleans())
    def lose(self, place: int, towards_desk: bool) -> None:
        items = (self.world.to_desk if towards_desk else self.world.to_generator).items
        if items:
            items.pop(place % len(items))

    @rule()
    def reconnect(self) -> None:
        self.world.reconnect()

    @rule()
    def generator_restarts(self) -> None:
        self.world.generator_restarts()

    @rule()
    def desk_syncs(self) -> None:
        self.world.desk.sync()

    @rule()
    def desk_saves_a_checkpoint(self) -> None:
        self.world.desk.checkpoint()

    @rule()
    def desk_restarts(self) -> None:
        self.world.desk_restarts()

    @invariant()
    def all_is_well(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.heal()


TestLink = Link.TestCase
TestLink.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_long_random_runs_lose_nothing_and_repeat_nothing():
    accepted = 0
    for seed in range(40):
        world = World()
        simulate(world, seed, steps=400)
        accepted += len(world.disk.accepted)
    assert accepted > 1000  # the runs did something


# -- mutants


class AcksBeforeTheSync(Desk):
    def result(self, peer, session, message) -> None:
        super().result(peer, session, message)
        self.sessions.mark_durable(session, message.seq)
        self.outgoing.put(peer, self.sessions.ack(session))


class ForgetsTheJournal(Desk):
    def restore(self, now) -> None:
        self.sessions.restore(self.disk.state, now)


class ForgetsTheCheckpoint(Desk):
    def checkpoint(self) -> None:
        self.disk.journal.clear()


class TakesEverythingAsNew(Desk):
    def result(self, peer, session, message) -> None:
        if not refused_by_rule(message.ordinal):
            self.unsynced.append((session, message.seq, message.ordinal))


class SavesWhatIsNotWritten(Desk):
    def checkpoint(self) -> None:
        for session, seq, _ in self.unsynced:
            self.sessions.mark_durable(session, seq)
        super().checkpoint()


class ForgetsItsOutbox(World):
    def reconnect(self) -> None:
        super().reconnect()
        for seq in list(self.session._unacked):
            self.session._drop(seq)


class KeepsItsIncarnation(World):
    def generator_restarts(self) -> None:
        self.incarnation = 0
        super().generator_restarts()


BROKEN_DESKS = (AcksBeforeTheSync, ForgetsTheJournal, ForgetsTheCheckpoint, TakesEverythingAsNew, SavesWhatIsNotWritten)
MUTANTS = [type(desk.__name__, (World,), {"desk_class": desk}) for desk in BROKEN_DESKS]
MUTANTS += [ForgetsItsOutbox, KeepsItsIncarnation]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_end_is_noticed(mutant):
    symptoms = "acknowledged but not on disk|accepted twice|acknowledged seq .* the last one sent is"

    def simulate_many() -> None:
        for seed in range(100):
            simulate(mutant(), seed, steps=400)

    with pytest.raises((AssertionError, ProtocolError), match=symptoms):
        simulate_many()

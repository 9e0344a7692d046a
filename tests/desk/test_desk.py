"""How the desk ends a run: when, with what said, and with which error. The trainer is a process that only exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from asyncrl.desk.daemon import Surroundings, make_desk
from asyncrl.desk.desk import FINAL_EVALUATION_LEASES, SIGNAL_STOP_TIMEOUT_S
from asyncrl.desk.trainer_process import TrainerProcess
from asyncrl.errors import CheckpointError, JournalError, TrainerFailed
from asyncrl.link import messages, trainer_messages
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.trainer_link import LAST_WORDS
from tests.desk.desk_parts import MEBIBYTE, VOCAB, MetricsLog, RolloutJobs, hello, make_parts, small_config
from tests.weights.manifests import manifest_of

STEPS = 5
LEASE_TIMEOUT_S = 60.0
FIGURES = {"reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0.0}


class Stop:
    def __init__(self):
        self.fd, self.received = os.eventfd(0), None


class World:
    def __init__(self, folder, num_evals=0):
        (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
        config = small_config(
            run__dir=str(folder),
            run__steps=STEPS,
            model__path=str(folder),
            generator__lease_timeout_s=LEASE_TIMEOUT_S,
        )
        self.folder = folder
        self.parts = make_parts(folder, config, num_evals=num_evals)
        self.sockets = [ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MEBIBYTE) for _ in range(2)]
        self.process = TrainerProcess(
            folder / "c",
            "ipc:///n",
            folder / "log",
            threads=1,
            max_restarts=1,
            weights_timeout_s=5.0,
        )
        self.stop = Stop()
        self.log = MetricsLog()
        self.rollouts = RolloutJobs()
        surroundings = Surroundings(*self.sockets, self.process, self.log, self.stop, rollouts=self.rollouts)
        self.desk = make_desk(config, self.parts.state, self.parts.prompts, surroundings)
        self.ranks = self.desk.ranks
        self.evaluator = self.desk.evaluator

    def trainer(self, code=""):
        """The trainer's process is at work, or about to end as `code` says."""
        code = code or "import signal; signal.pause()"
        self.process.ranks._children = [subprocess.Popen([sys.executable, "-c", code], start_new_session=True)]
        self.process._watched = True

    def asks_from(self, version, peer=b"trainer"):
        """A trainer that said hello asks for the batch of `version`."""
        self.desk._from_trainer(peer, trainer_messages.TrainerHello(0, 1, version, 1), b"", 0.0)
        self.desk._from_trainer(peer, trainer_messages.BatchRequest(0, version), b"", 0.0)

    def end(self):
        """The run is over, and the trainer ends by itself."""
        self.asks_from(STEPS)
        assert not self.desk._over(0.0), "it still saves"
        self.process.ranks.wait(60.0)
        return self.desk._over(1.0)

    def close(self):
        self.process.kill()
        for socket in self.sockets:
            socket.close()
        self.parts.journal.close()
        os.close(self.stop.fd)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def test_the_run_ends_when_the_trainer_that_lives_has_made_the_last_step(world):
    world.trainer()
    world.asks_from(STEPS - 1)
    assert world.desk._stopping_since is None
    world.desk._from_trainer(b"trainer", trainer_messages.StepDone(STEPS, FIGURES, 0.1, {}), b"", 0.0)
    assert world.parts.state.policy.trained == STEPS
    assert [figures.version for figures in world.log.steps] == [STEPS]
    world.desk._over(0.0)
    assert world.desk._stopping_since is None, "it has not saved what it did, and may die before it does"
    world.ranks.lost()
    world.desk._from_trainer(b"trainer", trainer_messages.BatchRequest(0, STEPS), b"", 0.0)  # was still on its way
    world.desk._over(0.0)
    world.asks_from(STEPS - 2, peer=b"next")
    world.desk._over(0.0)
    assert world.desk._stopping_since is None, "the next one trains again what got lost"
    world.asks_from(STEPS, peer=b"next")
    assert not world.desk._over(0.0)
    assert world.desk._stopping_since is not None


def report(world, version, now, *, peer=b"trainer", **time_s):
    world.desk._from_trainer(peer, trainer_messages.StepDone(version, FIGURES, 0.1, time_s), b"", now)


def test_the_time_of_steps_is_that_between_new_ones_also_where_a_trainer_dies_in_between(world):
    """Version 2 was made by the first trainer; the second makes it again, and then version 3."""
    world.asks_from(0)
    report(world, 1, 100.0, start=5.0, compute=1.0)
    report(world, 2, 103.0, start=5.0, compute=4.0)
    world.ranks.lost()
    world.asks_from(1, peer=b"next")
    report(world, 2, 120.0, peer=b"next", start=6.0, compute=3.0)
    report(world, 3, 123.0, peer=b"next", start=6.0, compute=6.0)
    _, second, third = world.log.steps
    assert (second.interval_s, second.learner_time_s) == (3.0, {"compute": 3.0})
    assert (third.interval_s, third.learner_time_s) == (20.0, {"start": 6.0, "compute": 6.0, "restart": 8.0})


def test_a_report_that_comes_after_its_trainers_death_was_heard_of_takes_nothing_from_the_next_one(world):
    world.asks_from(0)
    report(world, 1, 100.0, compute=1.0)
    world.ranks.lost()
    report(world, 2, 101.0, compute=2.0)
    world.asks_from(2, peer=b"next")
    report(world, 3, 111.0, peer=b"next", start=4.0, compute=2.0)
    _, late, third = world.log.steps
    assert (late.interval_s, late.learner_time_s) == (1.0, {"restart": 1.0})
    assert (third.interval_s, third.learner_time_s) == (10.0, {"start": 4.0, "compute": 2.0, "restart": 4.0})


def test_each_turn_shows_what_the_learner_does_and_what_it_waits_for(world):
    seen = []
    world.trainer()

    def turn():
        world.desk._over(0.0)
        world.desk._tick(0.0)
        seen.append(world.desk.pulse.look())
        return seen[-1].state, seen[-1].ready

    assert turn() == ("waiting", False)
    assert "no generator has connected" in seen[-1].waits_for
    world.desk._missing = ""
    world.desk._look_who_is_missing_at = 1.0
    world.desk._show_pulse()
    assert world.desk.pulse.look().waits_for == "the trainer is loading"
    world.asks_from(0)
    assert turn() == ("waiting", True)
    assert seen[-1].waits_for == "rollouts for the step after version 0"
    world.stop.received = signal.SIGTERM
    assert turn() == ("stopping", False)
    assert all(look.turns for look in seen)


def test_a_trainer_that_ends_well_ends_the_run(world):
    world.trainer("pass")
    assert world.end()


@pytest.mark.parametrize(("code", "error"), [(6, CheckpointError), (1, TrainerFailed)])
def test_what_the_trainer_could_not_do_at_the_end_is_the_learners_error(world, code, error):
    (world.folder / "log").write_text(f"{LAST_WORDS}export: no space left on device")
    world.trainer(f"raise SystemExit({code})")
    with pytest.raises(error, match="export: no space left on device"):
        world.end()


def test_a_trainer_that_was_killed_on_a_signal_costs_its_last_checkpoint_and_no_error(world, caplog):
    world.trainer()
    world.asks_from(0)
    world.stop.received = signal.SIGTERM
    assert not world.desk._over(0.0)
    assert world.desk._over(SIGNAL_STOP_TIMEOUT_S)
    assert not world.process.running
    assert "saved no last checkpoint" in caplog.text


def test_a_last_checkpoint_that_failed_on_a_signal_is_an_error(world):
    (world.folder / "log").write_text(f"{LAST_WORDS}no space left on device")
    world.trainer("raise SystemExit(6)")
    world.stop.received = signal.SIGTERM
    world.process.ranks.wait(60.0)
    with pytest.raises(CheckpointError, match="^no space left on device"):
        world.desk._over(0.0)


def test_the_last_evaluation_is_waited_for_with_a_deadline_and_the_wait_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    world = World(tmp_path, num_evals=3)
    try:
        world.trainer()
        world.asks_from(STEPS)
        world.evaluator.advance(STEPS, {None})
        limit_s = FINAL_EVALUATION_LEASES * LEASE_TIMEOUT_S
        assert not world.desk._over(1.0)
        for now in (2.0, 40.0):
            world.desk._say_waiting(now)
        what = f"the evaluation of version {STEPS} waits for a generator that proves it; no generator is alive"
        assert caplog.messages.count(what) == 1
        assert not world.desk._over(limit_s) and world.desk._stopping_since is None
        assert not world.desk._over(limit_s + 1.0) and world.desk._stopping_since is not None
        assert f"ends without its last evaluation {limit_s:.0f} s" in caplog.text
    finally:
        world.close()


def test_a_snapshot_of_a_trainer_that_died_is_not_offered(world):
    ready = trainer_messages.SnapshotReady(1, manifest_of(1, [1]), [], [], 1.0)
    world.desk._from_trainer(b"publisher", ready, b"", 0.0)
    assert world.desk.versions._planner.snapshot is None
    world.asks_from(1)
    world.desk._from_trainer(b"publisher", ready, b"", 0.0)
    assert world.desk.versions._planner.snapshot is ready


def test_a_learner_whose_folder_was_taken_over_ends_and_one_whose_generator_knew_another_folder_goes_on(world):
    refused = hello("g")
    refused = messages.Hello(**{name: getattr(refused, name) for name in refused.__slots__} | {"max_run_epoch": 7})
    epoch_file = world.folder / "run_epoch"
    epoch_file.write_text("1\n")
    world.desk._from_generator(b"g", refused, b"", 0.0)
    world.desk._check_superseded()
    epoch_file.write_text("2\n")
    world.desk._from_generator(b"g", refused, b"", 0.0)
    with pytest.raises(JournalError, match="at run epoch 2, this one at 1"):
        world.desk._check_superseded()

"""Learner and generators as one: real processes that stand for the daemons, ended in every way there is.

The supervisor runs in a process of its own: it takes in orphans and ends all its children.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.e2e.daemons import MARK, marked_processes
from tests.waits import wait_until

SCRIPT = """
import json, os, sys
from pathlib import Path
from asyncrl.cli.launch import supervisor as module
from asyncrl.host.processes import StopSignal

given = json.loads(sys.argv[1])
for name, value in given["limits"].items():
    setattr(module, name, value)
stop = StopSignal()
make = lambda name, code, log: module.Daemon(name, [sys.executable, "-S", "-c", code], dict(os.environ), log)
generators = [make(f"g{n}", code, Path(f"g{n}.log")) for n, code in enumerate(given["generators"])]
say = lambda text: print(text, file=sys.stderr, flush=True)
sys.exit(module.Supervisor(make("learner", given["learner"], None), generators, stop, say).run())
"""
QUICK = {"TURN_S": 0.02, "BACKOFF_S": 0.05, "LEAVE_BY_THEMSELVES_S": 0.3, "LAST_WORDS_S": 0.3}
SLEEPS = "import time; time.sleep(600)"
STOPS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(f"{NAME}.up", "w").close()
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{NAME}.up", "w").close()
time.sleep(600)
"""


class Supervised:
    """A supervisor at work in `folder`."""

    def __init__(self, folder, learner, *generators, **limits):
        self.folder = folder
        self.mark = uuid.uuid4().hex
        given = {"learner": learner, "generators": generators, "limits": {**QUICK, **limits}}
        self.errors = folder / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, json.dumps(given)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, MARK: self.mark, "PYTHONPATH": str(Path(__file__).parents[2])},
                start_new_session=True,
            )

    def left(self):
        return dict(marked_processes(self.mark))

    def up(self, *names):
        for name in names:
            wait_until(lambda name=name: (self.folder / f"{name}.up").exists(), f"{name} to be up: {self.said()}")

    def said(self):
        return self.errors.read_text()

    def code(self, timeout_s=30.0):
        code = self.process.wait(timeout_s)
        assert self.left() == {}, "nothing outlives it"
        return code


def named(code, name):
    return f"NAME = {name!r}\n{code}"


@pytest.fixture
def supervise(tmp_path):
    made = []

    def supervise(*args, **kwargs):
        made.append(Supervised(tmp_path, *args, **kwargs))
        return made[-1]

    yield supervise
    for supervised in made:
        supervised.process.kill()
        supervised.process.wait()
        for pid in supervised.left():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 7])
def test_the_learners_end_is_the_end_of_all_and_its_code_the_codes(supervise, code):
    run = supervise(f"import time; time.sleep(0.3); raise SystemExit({code})", named(STOPS, "g0"), SLEEPS)
    assert run.code() == code


def test_a_learner_that_was_killed_is_told_by_the_code(supervise):
    run = supervise("import os; os.kill(os.getpid(), 9)", SLEEPS)
    assert run.code() == 137


def test_a_generator_that_dies_starts_again_and_the_end_of_its_log_is_shown(supervise, tmp_path):
    dies_twice = (
        "import pathlib, sys, time\nlives = pathlib.Path('lives')\n"
        "lives.write_text(lives.read_text() + 'x' if lives.exists() else 'x')\n"
        "if len(lives.read_text()) < 3: print('the engine is dead', flush=True); sys.exit(5)\n"
        "open('third.up', 'w').close(); time.sleep(600)"
    )
    waits = "import os, time\nwhile not os.path.exists('third.up'): time.sleep(0.02)"
    run = supervise(waits, dies_twice)
    assert run.code() == 0
    assert run.said().count("g0 ended with exit code 5") == 2
    assert run.said().count("  the engine is dead") >= 2
    assert run.said().count("g0 starts again") == 2


LEAVES_AN_ORPHAN = """
import os, subprocess, sys, time
if os.path.exists("orphan.up"):
    try:
        state = open(f"/proc/{open('orphan.pid').read()}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        state = "X"
    open("gone" if state in "ZX" else "alive", "w").close()
    time.sleep(600)
orphan = subprocess.Popen([sys.executable, "-S", "-c", ORPHAN], start_new_session=True)
open("orphan.pid", "w").write(str(orphan.pid))
while not os.path.exists("orphan.up"):
    time.sleep(0.02)
sys.exit(5)
"""


def test_what_a_dead_generator_left_behind_is_gone_before_it_starts_again(supervise):
    """It may hold the memory of the GPU."""
    waits = "import os, time\nwhile not (os.path.exists('alive') or os.path.exists('gone')): time.sleep(0.02)"
    run = supervise(waits, f"ORPHAN = {named(STUBBORN, 'orphan')!r}\n{LEAVES_AN_ORPHAN}")
    assert run.code() == 0
    assert not (run.folder / "alive").exists()


ENDS_AN_ORPHAN = """
import os, subprocess, sys, time
middle = subprocess.Popen([sys.executable, "-S", "-c", "import os\\npid = os.fork()\\nif pid: print(pid)"],
                          stdout=subprocess.PIPE, text=True)
orphan = middle.communicate()[0].strip()
deadline = time.monotonic() + 20
while os.path.exists(f"/proc/{orphan}"):
    if time.monotonic() > deadline:
        sys.exit(7)
    time.sleep(0.02)
"""


def test_an_orphan_that_ends_while_the_run_goes_on_is_no_zombie(supervise):
    """Its parent is gone before it, and takes note of nothing."""
    run = supervise(ENDS_AN_ORPHAN, SLEEPS)
    assert run.code() == 0


def test_generators_that_die_again_and_again_end_the_run_with_their_code(supervise):
    run = supervise(named(STOPS, "learner"), "raise SystemExit(5)", MAX_DEATHS=3)
    assert run.code() == 5
    assert run.said().count("g0 ended with exit code 5") == 3
    assert "no generator is left: the learner is stopped" in run.said()


def test_a_user_error_is_not_tried_again_and_another_generator_goes_on(supervise, tmp_path):
    waits = "import os, time\nwhile not os.path.exists('said'): time.sleep(0.02)"
    run = supervise(waits, "raise SystemExit(2)", named(STOPS, "g1"))
    wait_until(lambda: "stays away" in run.said(), "the user error")
    (tmp_path / "said").touch()
    assert run.code() == 0
    assert run.said().count("g0 ended with exit code 2") == 1


def test_a_generator_that_was_stopped_by_hand_stays_away_and_the_learner_goes_on(supervise, tmp_path):
    waits = "import os, time\nwhile not os.path.exists('said'): time.sleep(0.02)"
    run = supervise(waits, "pass")
    wait_until(lambda: "is not started again" in run.said(), "its end")
    time.sleep(0.2)
    assert run.process.poll() is None
    (tmp_path / "said").touch()
    assert run.code() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_all_in_good_order(supervise, number):
    run = supervise(named(STOPS, "learner"), named(STOPS, "g0"), named(STOPS, "g1"))
    run.up("learner", "g0", "g1")
    run.process.send_signal(number)
    assert run.code(10.0) == 0
    assert "killed" not in run.said().partition("a second signal kills them")[2]


def test_who_does_not_stop_is_killed_at_its_deadline(supervise):
    run = supervise(named(STUBBORN, "learner"), named(STUBBORN, "g0"), GENERATOR_STOP_S=0.3, LEARNER_STOP_S=0.6)
    run.up("learner", "g0")
    run.process.send_signal(signal.SIGTERM)
    assert run.code(10.0) == 137
    assert "g0 did not end in time" in run.said() and "learner did not end in time" in run.said()


def test_generators_wait_for_nobody_once_the_learner_is_gone(supervise):
    run = supervise(named(STOPS, "learner"), named(STUBBORN, "g0"), GENERATOR_STOP_S=60.0)
    run.up("learner", "g0")
    run.process.send_signal(signal.SIGINT)
    assert run.code(10.0) == 0


@pytest.mark.parametrize("sent", [[signal.SIGINT, signal.SIGINT], [signal.SIGKILL]])
def test_a_second_signal_and_a_kill_leave_nothing(supervise, sent):
    run = supervise(named(STUBBORN, "learner"), named(STUBBORN, "g0"))
    run.up("learner", "g0")
    for number in sent:
        run.process.send_signal(number)
        wait_until(lambda: run.process.poll() is not None or "a second signal" in run.said(), "the signal to be seen")
    assert run.process.wait(10.0) in (130, -9)
    wait_until(lambda: not run.left(), "the kernel to end the daemons", 5.0)


def test_what_a_daemon_left_behind_is_ended_too(supervise):
    """A grandchild in a session of its own, which no signal to the daemon's process group reaches."""
    leaves = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-S', '-c', {named(STUBBORN, 'orphan')!r}], start_new_session=True)\n"
        "import time\nwhile not os.path.exists('orphan.up'): time.sleep(0.02)"
    )
    run = supervise(f"{leaves}", named(STOPS, "g0"))
    assert run.code() == 0

"""The ledger: whatever is switched, nested or left in another order, the sum is the time that has passed."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from asyncrl.metrics.ledger import (
    GeneratorActivity,
    LearnerActivity,
    Ledger,
    add,
    in_words,
    known_seconds,
    shares,
    since,
)
from tests.waits import wait_until

NAMES = ["start", "data", "compute", "snapshot"]


class FakeClock:
    """Stands still unless it is told to go on."""

    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now


def counted_by_hand(events, end):
    """Seconds by activity from (time, what, key, activity), second by second: the last begun of those that are open."""
    spent = {}
    for second in range(end):
        beneath, opened = NAMES[0], []
        for moment, what, key, activity in events:
            if moment > second:
                break
            if what == "switch":
                beneath = activity
            elif what == "begin":
                opened.append((key, activity))
            else:
                opened = [entry for entry in opened if entry[0] != key]
        activity = opened[-1][1] if opened else beneath
        spent[activity] = spent.get(activity, 0.0) + 1.0
    return spent


@pytest.mark.parametrize("seed", range(30))
def test_any_nesting_and_overlap_agrees_with_a_count_second_by_second(seed):
    chance, clock, events, opened = random.Random(seed), FakeClock(0.0), [], {}
    ledger = Ledger(NAMES[0], clock=clock)
    for key in range(60):
        clock.now += chance.choice([0, 0, 1, 2, 5])
        what, activity = chance.choice(["switch", "begin", "begin", "end"]), chance.choice(NAMES)
        if what == "end":
            if not opened:
                continue
            key = chance.choice(list(opened))  # in any order, as tasks of an event loop end
            opened.pop(key).close()
        elif what == "begin":
            opened[key] = ExitStack()
            opened[key].enter_context(ledger.during(activity))
        else:
            ledger.switch(activity)
        events.append((clock.now, what, key, activity))
    clock.now += 3
    assert ledger.seconds() == counted_by_hand(events, int(clock.now))
    assert sum(ledger.seconds().values()) == clock.now == ledger.elapsed_s


def test_a_second_inside_belongs_to_what_is_inside_alone():
    clock = FakeClock()
    ledger = Ledger(LearnerActivity.OTHER, clock=clock)
    clock.now += 1
    with ledger.during(LearnerActivity.COMPUTE):
        clock.now += 2
        with ledger.during(LearnerActivity.RANKS):
            clock.now += 4
            assert ledger.activity == "ranks"
        clock.now += 8
    clock.now += 16
    assert ledger.seconds() == {"other": 17.0, "compute": 10.0, "ranks": 4.0}


def test_what_ends_by_an_error_has_ended():
    clock = FakeClock()
    ledger = Ledger("other", clock=clock)
    with pytest.raises(KeyError), ledger.during("compute"):
        clock.now += 1
        raise KeyError
    clock.now += 1
    assert ledger.seconds() == {"compute": 1.0, "other": 1.0}


def test_another_thread_moves_nothing():
    """A backward pass on a GPU calls back in a thread of its own, while the ledger's waits for it."""
    clock = FakeClock()
    ledger = Ledger("compute", clock=clock)

    def elsewhere():
        with ledger.during("ranks"):
            clock.now += 2

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10.0)
    assert ledger.seconds() == {"compute": 2.0}


def test_what_took_no_time_is_absent_and_an_age_counts():
    clock = FakeClock()
    ledger = Ledger("start", age_s=2.5, clock=clock)
    ledger.switch("data")
    ledger.switch("compute")
    assert ledger.seconds() == {"start": 2.5}
    clock.now += 1
    assert ledger.seconds() == {"start": 2.5, "compute": 1.0}
    assert ledger.elapsed_s == 3.5


def test_a_million_short_activities_sum_up_to_the_clock():
    """With floats added up, a long run would drift from the clock."""
    clock = FakeClock(1e6)
    ledger = Ledger("a", clock=clock)
    for turn in range(200_000):
        clock.now = 1e6 + (turn + 1) * 1e-4 / 3
        ledger.switch("ab"[turn % 2])
    assert sum(ledger.seconds().values()) == pytest.approx(ledger.elapsed_s, abs=2e-9)


SCRIPT = """
import json, sys
from asyncrl.metrics.ledger import Ledger
ledger = Ledger("other")
with ledger.during("compute"):
    print("at work", flush=True)
    sys.stdin.readline()
print(json.dumps([ledger.seconds(), ledger.elapsed_s]), flush=True)
"""
STOPPED_S = 0.5


def test_the_time_of_a_stopped_process_counts_for_what_it_was_doing():
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "at work\n"
        child.send_signal(signal.SIGSTOP)
        stat = f"/proc/{child.pid}/stat"
        wait_until(lambda: open(stat).read().rpartition(")")[2].split()[0] == "T", "the stop")  # noqa: SIM115
        stopped_at = time.monotonic()
        wait_until(lambda: time.monotonic() - stopped_at >= STOPPED_S, "time to pass")
        child.send_signal(signal.SIGCONT)
        answer, _ = child.communicate("go on\n", timeout=60)
    finally:
        child.kill()
    seconds, elapsed_s = json.loads(answer)
    assert seconds["compute"] >= STOPPED_S
    assert sum(seconds.values()) == pytest.approx(elapsed_s, abs=0.01)


# -- sums of reports


def test_names_of_another_version_go_to_other():
    given = {"decode": 3.0, "dreaming": 2.0, "other": 1.0}
    assert known_seconds(given, GeneratorActivity) == {"decode": 3.0, "other": 3.0}


def test_totals_that_fall_take_nothing_away():
    assert since({"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 1.5, "c": 4.0, "d": 0.0}) == {"b": 0.5, "c": 4.0}
    total = {"a": 1.0}
    add(total, {"a": 0.5, "b": 2.0})
    assert total == {"a": 1.5, "b": 2.0}


def test_shares_are_of_the_whole_and_the_largest_comes_first():
    assert shares({"a": 1.0, "b": 3.0}) == {"b": 0.75, "a": 0.25}
    assert shares({}) == shares({"a": 0.0}) == {}
    assert in_words({"messages": 0.4, "compute": 60.0, "data": 39.6}) == "compute 60%   data 40%"
    assert in_words({}) == "-"


@pytest.mark.parametrize("kind", [LearnerActivity, GeneratorActivity])
def test_an_activity_equals_its_name_and_says_what_it_is(kind):
    assert kind("start") is kind.START
    assert {str(activity): activity.name.lower() for activity in kind} == {name: name for name in map(str, kind)}
    assert json.loads(json.dumps({kind.OTHER: 1.0})) == {"other": 1.0}
    assert all(activity.sentence.endswith(".") for activity in kind)

"""CPU time of a tree of processes: what children use counts, also after their end."""

import subprocess
import sys
import time

import pytest

from asyncrl.host import cpu_time
from asyncrl.host.cpu_time import TreeCpuTime

BURN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]]) if len(sys.argv) > 1 else None
end = time.process_time() + 0.3
while time.process_time() < end: pass
print("burnt", flush=True)
sys.stdin.readline()
"""


def test_the_time_of_children_and_their_children_counts_and_stays_when_they_end(monkeypatch):
    monkeypatch.setattr(cpu_time, "RESCAN_S", 0.0)
    times = TreeCpuTime()
    before, own_before = times.seconds(), time.process_time()
    child = subprocess.Popen(
        [sys.executable, "-c", BURN, BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdin is not None
    assert [child.stdout.readline() for _ in range(2)] == ["burnt\n"] * 2  # the grandchild has the same output
    grown = times.seconds() - before - (time.process_time() - own_before)
    assert 0.55 <= grown < 30
    times._spent[child.pid] += 1e6  # as of an ended process whose number this one had been given
    assert times.seconds() >= before + 1e6
    times._spent[child.pid] -= 1e6
    child.communicate("\n\n")
    after = times.seconds()
    assert after >= before + grown
    assert times.seconds() - after == pytest.approx(0, abs=0.5)

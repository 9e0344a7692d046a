"""The end of `asyncrl-generator` while its engine is being imported."""

from __future__ import annotations

import subprocess
import sys

LEAVES = """
import sys, threading
from asyncrl.cli import generator
from asyncrl.host.processes import UNSTOPPABLE_THREAD

def command(role, argv, start):
    threading.Thread(target=threading.Event().wait, name=UNSTOPPABLE_THREAD).start()
    print("said before the end")
    return 7

generator.command = command
sys.exit(generator.main([]))
"""


def test_an_import_that_goes_on_does_not_hold_up_the_end_and_nothing_that_was_said_is_lost():
    """Python's own end would wait for that thread for ever."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "said before the end\n"), done.stderr

"""How tests wait: for a condition, with a deadline, and with patience for a machine that does other things as well."""

from __future__ import annotations

import time
from collections.abc import Callable

# How much later than at its deadline a call may end on a busy machine. What a test with it guards against must take
# longer than that: a call without the deadline has to hang, or to wait for another one that comes much later.
LATE_S = 6.0


def wait_until(
    condition: Callable[[], object],
    what: str = "the condition",
    timeout_s: float = 30.0,
    *,
    turn: Callable[[], object] = lambda: None,
) -> None:
    """Returns once `condition` holds; fails at the deadline and names what was waited for. `turn` runs in between."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        turn()
        time.sleep(0.01)

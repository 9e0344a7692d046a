"""How much of the same the suite does: as much as finds what is broken, or as much as was once promised."""

from __future__ import annotations

import os


def usual(size: int, *, full: int) -> int:
    """`size`, or `full` where ASYNCRL_TEST_SIZES=full."""
    return full if os.environ.get("ASYNCRL_TEST_SIZES", "") == "full" else size

"""Every fault that was found has a test named after it, so that each can be run by its letter and number."""

from __future__ import annotations

import re
from pathlib import Path

FAULTS = Path(__file__).parent


def numbered(letter: str, *numbers: int) -> set[str]:
    return {f"{letter}{number}" for number in numbers}


# W: wrong numbers without a word. T: the tests. D: data and tasks. R: the run. U: the user.
ENTRIES = (
    numbered("W", *range(1, 13))
    | numbered("T", 1)
    | numbered("D", *range(1, 15))
    | numbered("R", *range(1, 22))
    | numbered("U", 1, 2, *range(4, 13))
)


def test_every_fault_has_a_test_of_its_name():
    tested = set()
    for path in FAULTS.glob("test_*.py"):
        tested |= set(re.findall(r"^(?:async )?def test_([A-Z]\d+)_", path.read_text(), re.MULTILINE))
    assert tested >= ENTRIES, f"without a test: {sorted(ENTRIES - tested)}"
    assert tested <= ENTRIES, f"tests of no known fault: {sorted(tested - ENTRIES)}"

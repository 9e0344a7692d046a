"""Rewards of the user's own, found by their import path; each gets what its signature names."""

from __future__ import annotations

import asyncio


async def letters(completion: str, topic: str) -> float:
    """The share of letters, at least 0.1: a zero in a batch could only be a failure that became a number."""
    await asyncio.sleep(0)
    assert topic == "sums"
    return max(0.1, sum(character.isalpha() for character in completion) / max(1, len(completion)))

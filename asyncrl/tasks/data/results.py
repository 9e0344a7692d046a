"""What a user's function returned, as the program needs it: awaited if it is a coroutine, numbers as floats."""

from __future__ import annotations

import asyncio
import inspect
from functools import cache
from numbers import Real
from typing import Any


def awaited(value: Any) -> Any:
    """`value`, or what it comes to if an `async def` gave it. One event loop serves all calls of a process.

    So clients that belong to a loop may be kept from one reward to the next. Raises whatever the coroutine raises.
    """
    return _runner().run(_finish(value)) if inspect.isawaitable(value) else value


def as_number(value: object) -> float | None:
    """A number as a float, also one of numpy or torch (np.bool_, an array without axes); None for anything else."""
    if not isinstance(value, Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, Real) else None


@cache
def _runner() -> asyncio.Runner:
    return asyncio.Runner()


async def _finish(value: Any) -> Any:
    return await value

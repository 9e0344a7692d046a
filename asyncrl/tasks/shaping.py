"""Building blocks for rewards: penalties on length, and a check of form. Pure functions.

Lengths are in whatever unit the task counts in (characters, words, tokens); both arguments in the same.
"""

from __future__ import annotations

import re


def length_penalty(length: float, max_length: float) -> float:
    """Linear: 0 for an empty completion, -1 at max_length and beyond."""
    _check_positive("max_length", max_length)
    return -min(1.0, max(0.0, length / max_length))


def overlong_penalty(length: float, max_length: float, margin: float) -> float:
    """Soft overlong punishment: 0 up to max_length - margin, from there linearly down to -1 at max_length.

    DAPO (arXiv:2503.14476), equation 13, with L_max = max_length and L_cache = margin.
    """
    _check_positive("max_length", max_length)
    if not 0 < margin <= max_length:
        raise ValueError(f"margin={margin} must be above 0 and at most max_length={max_length}")
    over = length - (max_length - margin)
    return -min(1.0, max(0.0, over / margin))


def has_form(completion: str, pattern: str) -> float:
    """1.0 when the whole completion, without blanks at its ends, matches the regular expression; else 0.0.

    `.` matches line ends too.
    """
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} must be above 0")

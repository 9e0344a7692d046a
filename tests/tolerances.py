"""How far two computations of one number may lie apart, counted in roundings of their dtype at their magnitude.

Kernels add up in another order and round exp and log in another way on another kind of CPU. An absolute tolerance
fits the magnitudes it was written for; a relative one fails where terms cancel. So the magnitude is that of the terms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

STEPS = 64  # roundings one upon the other in a forward pass of the tiny models, several times over


def slack(scale: float, dtype: torch.dtype = torch.float32, steps: float = STEPS) -> float:
    """`steps` roundings of a number as large as `scale`."""
    return steps * torch.finfo(dtype).eps * scale


def near(expected: float, scale: float = 0.0, dtype: torch.dtype = torch.float32, steps: float = STEPS):
    """Equals numbers that lie near `expected`. scale: size of the terms it was added up from, which may cancel."""
    return pytest.approx(expected, rel=0.0, abs=slack(max(abs(expected), scale), dtype, steps))


def assert_near(ours, expected, dtype: torch.dtype = torch.float32, steps: float = STEPS) -> None:
    """Compares arrays or tensors; the magnitude is that of the largest element expected."""
    ours, expected = (np.asarray(torch.as_tensor(x).detach().double()) for x in (ours, expected))
    largest = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(ours, expected, rtol=0.0, atol=slack(largest, dtype, steps))

"""When Python looks for cyclic garbage: rarely, in a process whose answers must not wait for it.

Reference counts free nearly everything. What is left to the collector are cycles, which it finds by a walk over all
objects that are alive: 20 to 60 ms in a desk with 12,288 leases, when nothing happened but that they became many.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# A walk over the newest objects after this many more, over the middle ones after 10 of those (1 to 3 ms), over all
# after 250 of these: only in a process that has five million objects more than before, or as many that are garbage.
THRESHOLDS = (2_000, 10, 250)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Until the end of the `with` block: what is alive at its beginning is never walked over, and the rest seldom."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def no_collections() -> Iterator[None]:
    """Around imports: nothing of what they make is garbage, and walks over all of it take a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

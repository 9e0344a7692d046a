"""A set of ordinals that fills up mostly in order, in little memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Frontier:
    """Integers >= 0: all of those below `watermark`, and `above`, a few beyond it.

        frontier = Frontier()            # watermark 0, above {}
        frontier.add(0)                  # watermark 1, above {}
        frontier.add(2)                  # watermark 1, above {2}
        frontier.add(1)                  # watermark 3, above {}

    Members are never removed.
    """

    __slots__ = ("above", "watermark")

    def __init__(self, watermark: int = 0, above: Iterable[int] = ()) -> None:
        self.watermark = watermark
        self.above: set[int] = set()
        for ordinal in above:
            self.add(ordinal)

    def add(self, ordinal: int) -> None:
        """Adds one member; adding it again changes nothing."""
        if ordinal >= self.watermark:
            self.above.add(ordinal)
        while self.watermark in self.above:
            self.above.remove(self.watermark)
            self.watermark += 1

    def __contains__(self, ordinal: int) -> bool:
        return 0 <= ordinal < self.watermark or ordinal in self.above

    def __len__(self) -> int:
        return self.watermark + len(self.above)

    def copy(self) -> Frontier:
        return Frontier(self.watermark, self.above)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"watermark": self.watermark, "above": sorted(self.above)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Frontier:
        return cls(state["watermark"], state["above"])

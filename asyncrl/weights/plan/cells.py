"""Which generators share a weight channel. A member of a collective can stall all others: a cell bounds how many."""

from __future__ import annotations

from collections.abc import Sequence


def plan_cells(cells: Sequence[Sequence[str]], loose: Sequence[str], cell_size: int) -> list[list[str]]:
    """Puts `loose` generators where there is room, the smallest cell first, and the rest into cells of their own.

    A cell that needs nobody stays as it is, so that its channel can be used again.

    Args:
        cells: members of the cells as they are; empty ones are dropped.
        loose: generators without a cell.
        cell_size: most generators of one cell.

    Returns:
        The cells, those given first and in their order.
    """
    planned = [list(names) for names in cells if names]
    for name in loose:
        smallest = min(planned, key=len, default=None)
        if smallest is None or len(smallest) >= cell_size:
            planned.append([name])
        else:
            smallest.append(name)
    return planned

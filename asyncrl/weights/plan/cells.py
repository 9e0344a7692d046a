"""Which generators share a weight channel. A member of a collective can stall all others: a cell bounds how many."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def plan_cells(
    cells: Sequence[Sequence[str]],
    loose: Sequence[str],
    cell_size: int,
    fits: Callable[[Sequence[str], str], bool] = lambda names, name: True,
) -> list[list[str]]:
    """Puts `loose` generators where there is room, the smallest cell first, and the rest into cells of their own.

    A cell that needs nobody stays as it is, so that its channel can be used again.

    Args:
        cells: members of the cells as they are; empty ones are dropped.
        loose: generators without a cell.
        cell_size: most generators of one cell.
        fits: whether a generator can share a channel with these.

    Returns:
        The cells, those given first and in their order.
    """
    planned = [list(names) for names in cells if names]
    for name in loose:
        with_room = [names for names in planned if len(names) < cell_size and fits(names, name)]
        if with_room:
            min(with_room, key=len).append(name)
        else:
            planned.append([name])
    return planned

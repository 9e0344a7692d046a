"""Who shares a weight channel with whom."""

from hypothesis import given
from hypothesis import strategies as st

from asyncrl.weights.plan.cells import plan_cells


def test_the_smallest_cell_takes_newcomers_first():
    assert plan_cells([["a", "b"], ["c"]], ["d", "e"], 3) == [["a", "b", "e"], ["c", "d"]]


def test_who_finds_no_room_gets_a_cell():
    assert plan_cells([["a", "b"]], ["c", "d", "e"], 2) == [["a", "b"], ["c", "d"], ["e"]]


def test_cells_without_members_are_dropped():
    assert plan_cells([[], ["a"]], [], 2) == [["a"]]


@given(
    sizes=st.lists(st.integers(0, 4), max_size=5),
    loose=st.integers(0, 12),
    cell_size=st.integers(1, 4),
)
def test_everybody_has_one_place_and_no_cell_grows_beyond_its_size(sizes, loose, cell_size):
    names = iter(f"g{i}" for i in range(100))
    cells = [[next(names) for _ in range(min(size, cell_size))] for size in sizes]
    newcomers = [next(names) for _ in range(loose)]
    planned = plan_cells(cells, newcomers, cell_size)
    members = [name for cell in planned for name in cell]
    assert sorted(members) == sorted([*newcomers, *(name for cell in cells for name in cell)])
    assert all(1 <= len(cell) <= cell_size for cell in planned)
    kept = [cell for cell in cells if cell]
    assert all(new[: len(old)] == old for new, old in zip(planned, kept, strict=False)), "nobody is moved"
    room = sum(cell_size - len(cell) for cell in kept)
    assert len(planned) == len(kept) + -(-max(0, loose - room) // cell_size), "no more cells than needed"

"""A rank that dies or hangs is noticed by the others within their deadline; one that waits is kept alive."""

from __future__ import annotations

import re
import time

import pytest

from tests.trainer.ranks.processes import started
from tests.waits import LATE_S

PROGRAM = "tests.trainer.ranks.lost_rank_program"
DEADLINE_S = 3.0  # as the program sets it


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict[int, str]]:
    """What each rank said at its end, by what went wrong; the worlds run beside each other."""
    folder = tmp_path_factory.mktemp("lost")
    found: dict[str, dict[int, str]] = {}
    whats = ("kill", "stop", "keep_alive")
    worlds = []
    for what in whats:
        (folder / what).mkdir()
        world = started(2, PROGRAM, [what, str(folder / what)], folder / f"{what}.log")
        worlds.append((what, world, world.__enter__()))
    try:
        deadline = time.monotonic() + 150.0
        for what, _, children in worlds:
            waited_for = children if what == "keep_alive" else children[:1]
            for child in waited_for:
                assert child.wait(max(1.0, deadline - time.monotonic())) == 0, (folder / f"{what}.log").read_text()
            found[what] = {int(path.name[5:]): path.read_text() for path in (folder / what).glob("rank_*")}
    finally:
        for _, world, _ in worlds:
            world.__exit__(None, None, None)
    return found


def seconds(text: str) -> float:
    return float(re.search(r"after ([\d.]+) s", text).group(1))


def test_a_killed_rank_is_noticed_at_once_and_named(said):
    text = said["kill"][0]
    assert text.startswith("RankLost")
    assert "silent [1]" in text
    assert seconds(text) < DEADLINE_S + LATE_S


def test_a_rank_that_hangs_is_noticed_at_the_deadline_and_named(said):
    text = said["stop"][0]
    assert text.startswith("RankLost")
    assert "silent [1]" in text
    assert DEADLINE_S - 1.0 < seconds(text) - 3.0 < DEADLINE_S + LATE_S  # three more for the last notes


def test_ranks_that_wait_longer_than_their_deadline_are_kept_alive_and_nobody_takes_their_seats(said):
    assert said["keep_alive"] == {0: "well", 1: "well"}

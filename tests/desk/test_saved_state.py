"""The desk's state in a checkpoint: the same bytes as ever, and those of earlier releases are understood."""

from __future__ import annotations

import msgpack
import pytest

from asyncrl.desk.counters import RunTotals
from asyncrl.desk.opening.saved_state import SavedDesk
from asyncrl.errors import CheckpointError
from asyncrl.link.desk_session import SavedSession
from asyncrl.replay.lease_records import SavedLeases
from asyncrl.types import Frontier
from tests.desk.desk_parts import make_parts, train_group

MAP = {
    "leases": {
        "next_ordinal": 9,
        "next_eval_ordinal": 6,
        "settled": {"watermark": 3, "above": [5, 7]},
        "given_up": [5],
        "num_filtered": 1,
        "num_left_out": 2,
        "failures": [[4, 2], [8, 1]],
        "counters": {},
    },
    "sessions": {"g1": {"incarnation": 2, "instance": "g1.2", "watermark": 11, "beyond": [13, 14]}},
    "account": {
        "rollouts_acked": 40,
        "rollouts_dropped": 4,
        "groups_filtered": 1,
        "tokens_filtered": 12,
        "rollouts_failed": {"engine": 4},
        "prompts_left_out": 2,
    },
    "evals_done": [0, 2],
}
SAVED = SavedDesk(
    leases=SavedLeases(9, 6, Frontier(3, [5, 7]), [5], 1, {4: 2, 8: 1}, 2),
    sessions={"g1": SavedSession(2, "g1.2", 11, [13, 14])},
    totals=RunTotals(40, 4, 1, 12, {"engine": 4}, 2),
    evals_done=frozenset({0, 2}),
)


def test_the_bytes_are_those_of_the_map():
    assert SAVED.encode() == msgpack.packb(MAP)
    assert SavedDesk.decode(msgpack.packb(MAP)) == SAVED


def test_a_checkpoint_of_before_groups_were_filtered_and_with_counters_that_nobody_read_is_understood():
    leases = {name: value for name, value in MAP["leases"].items() if name != "num_filtered"}
    counters = {"rollouts_acked": 40, "rollouts_trained": 32, "rollouts_dropped": 4, "results_refused": 3}
    older = {
        "leases": leases | {"counters": {"granted": 12}},
        "sessions": MAP["sessions"],
        "account": counters | {"sync_failures": 1, "rollouts_failed": {}},
    }
    saved = SavedDesk.decode(msgpack.packb(older))
    assert saved.leases.num_filtered == 0 and saved.leases.settled == SAVED.leases.settled
    assert saved.totals == RunTotals(rollouts_acked=40, rollouts_dropped=4)
    assert saved.evals_done == frozenset()


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"leases": 3, "account": {}})])
def test_what_is_no_state_of_a_desk_is_said(data):
    with pytest.raises(CheckpointError, match=f"of {len(data)} bytes cannot be decoded"):
        SavedDesk.decode(data)


def test_a_saved_state_does_not_change_with_the_run(tmp_path):
    parts = make_parts(tmp_path)
    session = parts.connect()
    saved = parts.state.for_checkpoint()
    before = saved.encode()
    parts.leases.grant("g1", 0, 2, 0, 0.0)
    parts.deliver(session, train_group(0), seq=1)
    parts.make_durable()
    parts.leases.train([train_group(0).key])
    parts.state.counters.lease_failed("engine", 4)
    parts.state.evals_done.add(0)
    assert saved.encode() == before
    assert parts.state.for_checkpoint().encode() != before
    parts.journal.close()

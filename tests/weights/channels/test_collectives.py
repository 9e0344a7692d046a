"""Weight channels are process groups of their own: nothing of theirs goes through torch.distributed's default group.

That group belongs to the ranks of the trainer (`trainer.world`); a channel that used it would wait for their training.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import asyncrl
from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.collectives import AHEAD
from tests.weights.channels.members import in_threads, pair

PACKAGE = Path(asyncrl.__file__).parent
OWN_OBJECTS = {"Store", "PrefixStore", "TCPStore", "ProcessGroupGloo", "ProcessGroupNCCL", "BroadcastOptions", "Work"}
OWN_OBJECTS |= {"DTensor", "Shard"}  # types
OWN_OBJECTS |= {"compute_local_shape_and_global_offset"}  # arithmetic


def distributed_names(tree: ast.AST) -> set[str]:
    """What a module takes from torch.distributed, under whatever name it imports that."""
    aliases, used = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname for a in node.names if a.name.startswith("torch.distributed") and a.asname}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            aliases |= {a.asname or a.name for a in node.names if node.module == "torch" and a.name == "distributed"}
            used |= {
                a.name for a in node.names if node.module.startswith(("torch.distributed", "torch._C._distributed"))
            }
    used |= {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases
    }
    return used


def test_the_search_finds_calls_under_every_name():
    for text in (
        "import torch.distributed as dist\ndist.broadcast(x)",
        "import torch.distributed\ntorch.distributed.broadcast(x)",
        "from torch import distributed\ndistributed.broadcast(x)",
        "from torch.distributed import broadcast",
        "from torch.distributed.distributed_c10d import broadcast",
        "from torch._C._distributed_c10d import broadcast",
    ):
        assert "broadcast" in distributed_names(ast.parse(text)), text


@pytest.mark.parametrize("area", ["weights", "generator"])
def test_only_bare_process_groups_and_stores_are_used_and_no_function_of_the_default_group(area):
    used = {}
    for path in sorted((PACKAGE / area).rglob("*.py")):
        if names := distributed_names(ast.parse(path.read_text())) - OWN_OBJECTS:
            used[path.name] = names
    assert used == {}
    assert area != "weights" or "ProcessGroupGloo" in distributed_names(
        ast.parse((PACKAGE / "weights" / "channels" / "collectives.py").read_text())
    )


@pytest.fixture
def default_group():
    """A default group of one rank, as a trainer may have; it counts the collectives that go through it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_group()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_weight_channel_neither_uses_nor_needs_the_default_group(default_group, backend):
    known = dict(dist.distributed_c10d._world.pg_map)
    before = default_group._get_sequence_number_for_group()
    root, member = pair(ChannelSpec("127.0.0.1", 0, "own/1", 0, 2, backend, 20.0))
    sent, taken = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    in_threads(lambda: root.broadcast([sent], 10.0), lambda: member.broadcast([taken], 10.0))
    assert torch.equal(sent, taken)
    assert dist.distributed_c10d._world.pg_map == known, "nothing was registered beside the default group"
    assert default_group._get_sequence_number_for_group() == before
    dist.all_reduce(torch.zeros(1))
    assert default_group._get_sequence_number_for_group() > before, "the count counts"

    dist.destroy_process_group()
    taken.zero_()
    in_threads(lambda: root.broadcast([sent], 10.0), lambda: member.broadcast([taken], 10.0))
    assert torch.equal(sent, taken)
    root.close()
    member.close()


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
@pytest.mark.parametrize("num_parts", [0, 1, AHEAD, 2 * AHEAD + 1])
def test_parts_of_any_number_and_size_arrive_in_order_and_each_is_told(backend, num_parts):
    root, member = pair(ChannelSpec("127.0.0.1", 0, "parts/1", 0, 2, backend, 20.0))
    sent = [torch.randint(0, 256, (1 + 70_000 * index,), dtype=torch.uint8) for index in range(num_parts)]
    taken = [torch.zeros_like(part) for part in sent]
    told = {0: [], 1: []}
    in_threads(
        lambda: root.broadcast(sent, 10.0, told[0].append), lambda: member.broadcast(taken, 10.0, told[1].append)
    )
    assert all(torch.equal(left, right) for left, right in zip(sent, taken, strict=True))
    assert told[0] == told[1] == [part.nbytes for part in sent]
    root.close()
    member.close()


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_broadcast_that_stops_in_the_middle_has_told_how_far_it_was(backend):
    root, member = pair(ChannelSpec("127.0.0.1", 0, "parts/2", 0, 2, backend, 20.0))
    parts = torch.ones(10, 100_000, dtype=torch.uint8)
    told, failures = {0: [], 1: []}, []

    def send():
        root.broadcast(list(parts[:4]), 10.0, told[0].append)  # and no more

    def take():
        try:
            member.broadcast(list(torch.zeros_like(parts)), 1.0, told[1].append)
        except ChannelError as failure:
            failures.append(str(failure))

    in_threads(send, take)
    assert told == {0: [100_000] * 4, 1: [100_000] * 4}
    assert failures and "broadcast of 1000000 bytes" in failures[0]
    root.close()
    member.close()

"""One of several ranks that hold a policy by fully_shard and publish it together.

python sender_process.py RANK SIZE WORLD_PORT DESK_ADDRESS SETTINGS(json)

All ranks read the same lines on stdin:
    publish VERSION HOW FILE   changes the weights ("step": by an optimizer step, "few": some words, "none"), publishes
                               them, and rank 0 writes the whole state there
    lie                        the next bytes that this rank sends differ from what it measured, by one bit
    crash                      waits for the end of the publisher, prints what ended it, and ends
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from asyncrl.host.processes import leave
from asyncrl.weights.bytes.shards import local_of
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.publisher import Publisher
from asyncrl.weights.relay import Relay
from asyncrl.weights.shard_publisher import ShardPublisher

WORDS = {2: torch.int16, 4: torch.int32}


class Model(nn.Module):
    """A tied head over an odd vocabulary, a tensor with fewer rows than ranks, and one that is not split."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 24)
        self.inner = nn.Linear(24, 40)
        self.outer = nn.Linear(40, 24)
        self.pair = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.scale = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(24, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        hidden = self.outer(torch.tanh(self.inner(self.embed(ids)))) * self.pair.sum() * self.scale.sum()
        return self.head(hidden)


def publisher_of(rank: int, size: int, address: str, buffer: SnapshotBuffer, settings: dict) -> object:
    canary = [np.arange(4)]
    if size == 1:
        return Publisher(address, buffer, canary, host="127.0.0.1")
    relay = Relay("127.0.0.1", size) if rank == 0 else None
    text = torch.zeros(200, dtype=torch.uint8)
    if relay is not None:
        text[: len(relay.invitation)] = torch.frombuffer(bytearray(relay.invitation.encode()), dtype=torch.uint8)
    dist.broadcast(text, 0)
    if relay is not None:
        return Publisher(address, buffer, canary, host="127.0.0.1", relay=relay)
    return ShardPublisher(bytes(text[text > 0].tolist()).decode(), buffer)


def change(model: Model, optimizer: torch.optim.Optimizer, how: str) -> None:
    if how == "step":
        model(torch.arange(6)[None]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    elif how == "few":
        with torch.no_grad():
            for parameter in model.parameters():
                local = local_of(parameter)
                local.view(WORDS[local.element_size()]).view(-1)[::50] += 1


def main() -> None:
    rank, size, port = map(int, sys.argv[1:4])
    address, settings = sys.argv[4], json.loads(sys.argv[5])
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = Model(settings["vocab"]).to(getattr(torch, settings["dtype"]))
    for layer in (model.inner, model.outer):
        fully_shard(layer)
    fully_shard(model, ignored_params={model.scale})
    for module in (model.inner, model.outer, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)  # which moves every word
    named = list(model.named_parameters(remove_duplicate=False))
    buffer = SnapshotBuffer(
        named, settings["bucket_bytes"], sender=rank, senders=size, shared=settings["backend"] == "ipc"
    )
    publisher = publisher_of(rank, size, address, buffer, settings)
    publisher.start()
    print(json.dumps({"buffer_bytes": buffer.flat.numel()}), flush=True)
    scores = [np.full(3, -1.5, np.float32)]
    for line in sys.stdin:
        if line.strip() == "lie":
            assert isinstance(publisher, ShardPublisher)
            damage_what_is_sent(publisher)  # at once: the next version may be prepared before this thread sees it
            continue
        if line.strip() == "crash":
            publisher.join(30.0)
            print(json.dumps({"crash": str(publisher.crash)}), flush=True)
            leave(0)
        _, version, how, path = line.split()
        change(model, optimizer, how)
        whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.data for name, p in named}
        if rank == 0:
            save_file({name: tensor.clone() for name, tensor in whole.items()}, path)
        slot = torch.tensor([publisher.begin() if rank == 0 and size > 1 else 0])
        dist.broadcast(slot, 0)
        if rank == 0:
            publisher.publish(int(version), scores)
        else:
            publisher.publish(int(version), int(slot))
        print(json.dumps({"published": int(version)}), flush=True)
    publisher.stop(10.0)
    assert publisher.crash is None
    dist.destroy_process_group()
    leave(0)


def damage_what_is_sent(publisher: ShardPublisher) -> None:
    """Once: bits change between the measurement and the sending."""
    prepare = publisher._prepare

    def prepared(order: object) -> object:
        answer = prepare(order)
        publisher._slots[order.slot].buffer.flat[5] ^= 1
        publisher._prepare = prepare
        return answer

    publisher._prepare = prepared


if __name__ == "__main__":
    main()

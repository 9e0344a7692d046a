"""A publisher in a process of its own, which a test can stop: python publisher_process.py DESK_ADDRESS

`N` on stdin changes a part of the weights and publishes them as version N; `?` prints how many channels are open.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.publisher import Publisher


def main(address: str) -> None:
    weight = torch.nn.Parameter(torch.arange(20_000, dtype=torch.float32))
    publisher = Publisher(
        address,
        SnapshotBuffer([("weight", weight)], 4096),
        [np.arange(4)],
        host="127.0.0.1",
    )
    publisher.start()
    for line in sys.stdin:
        if line.strip() == "?":
            print(len(publisher._senders), flush=True)
            continue
        with torch.no_grad():
            weight[:100] += 1
        publisher.publish(int(line), [np.full(3, -1.5, np.float32)])
    publisher.stop(10.0)


if __name__ == "__main__":
    main(sys.argv[1])

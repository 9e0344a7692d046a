"""A process that writes a journal until it is killed, and says on stdout what it would have acknowledged.

python journal_writer.py FOLDER SEED
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from asyncrl.storage.journal import Journal
from tests.replay.replay_making import make_group


def main(folder: str, seed: int) -> None:
    rng = random.Random(seed)
    journal = Journal.open(Path(folder), segment_bytes=20_000)
    ordinal = seed * 1_000_000
    os.write(1, b"ready\n")
    while True:
        batch = range(ordinal, ordinal + rng.randint(1, 5))
        for ordinal in batch:
            journal.append(make_group(ordinal, body=rng.randbytes(rng.randint(0, 3000))), now=0.0)
        journal.make_durable()
        os.write(1, f"{batch[-1]}\n".encode())
        ordinal += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

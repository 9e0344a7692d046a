"""Who this generator is: a stable id and an incarnation that grows by one at each start.

Both live in a small file under an exclusive lock, so that two generators on one host never share an id and the learner
can tell a restarted generator from a zombie of itself.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from asyncrl.errors import ConfigError

MAX_PER_HOST = 256
MAX_ID_CHARACTERS = 128


@dataclass(slots=True)
class Identity:
    """`generator_id` is this process's as long as `lock` is open."""

    generator_id: str
    incarnation: int
    lock: IO[str]


def claim_identity(folder: Path, wanted_id: str) -> Identity:
    """Takes `wanted_id`, or the first free `<host>-<n>`, and raises its incarnation durably.

    Raises ConfigError when `wanted_id` cannot be sent, is held by a running generator, or its file is damaged.
    """
    if wanted_id and (len(wanted_id) > MAX_ID_CHARACTERS or not wanted_id.isprintable() or set(" /") & set(wanted_id)):
        raise ConfigError(
            f"generator.id={wanted_id!r:.200} must have at most {MAX_ID_CHARACTERS} printable characters, none of them "
            "a space or a slash"
        )
    folder.mkdir(parents=True, exist_ok=True)
    candidates = [wanted_id] if wanted_id else [f"{socket.gethostname()}-{n}" for n in range(MAX_PER_HOST)]
    for generator_id in candidates:
        if identity := _try_claim(folder / f"{generator_id}.incarnation", generator_id):
            return identity
    raise ConfigError(
        f"generator.id={wanted_id or candidates[0]!r}: a running generator holds it (lock in {folder}); "
        "stop it or choose another id"
    )


def _try_claim(path: Path, generator_id: str) -> Identity | None:
    """The identity with its next incarnation; None when another process holds it."""
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    lock.seek(0)
    text = lock.read().strip() or "0"
    if not text.isdecimal():
        lock.close()
        raise ConfigError(
            f"{path} holds {text[:20]!r}, not a number; write the highest incarnation of the learner's log there"
        )
    incarnation = int(text) + 1
    lock.seek(0)
    lock.truncate()
    lock.write(f"{incarnation}\n")
    lock.flush()
    # Durable before the first hello: an incarnation that is used twice would look like a duplicate, not a restart.
    os.fsync(lock.fileno())
    return Identity(generator_id, incarnation, lock)

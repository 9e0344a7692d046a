"""Who this generator is: a stable id and an incarnation that grows by one at each start.

Both live in a small file under an exclusive lock, so that two generators on one host never share an id and the learner
can tell a restarted generator from a zombie of itself.
"""

from __future__ import annotations

import fcntl
import os
import socket
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from asyncrl.errors import ConfigError
from asyncrl.storage.disk import make_folder

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
    make_folder(folder)
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
    _make(path)
    lock = path.open("r+", errors="replace")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    try:
        incarnation = _read(path, lock.read()) + 1
    except ConfigError:
        lock.close()
        raise
    # In one write of the same length or more, so that a crash leaves the old count or the new one, never an empty file.
    os.pwrite(lock.fileno(), _line(incarnation).encode(), 0)
    os.ftruncate(lock.fileno(), len(_line(incarnation)))
    # Durable before the first hello: an incarnation that is used twice would look like a duplicate, not a restart.
    os.fsync(lock.fileno())
    return Identity(generator_id, incarnation, lock)


def _make(path: Path) -> None:
    """Makes the file in one piece, unless there is one: an empty file is a damaged one."""
    if path.exists():
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_text(_line(0))
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass  # another process was faster
    finally:
        fresh.unlink()


def _line(incarnation: int) -> str:
    digits = f"{incarnation:020d}"
    return f"{digits} {zlib.crc32(digits.encode()):08x}\n"


def _read(path: Path, text: str) -> int:
    """The count in the file. Earlier releases wrote the number alone. Raises ConfigError when it is damaged."""
    words = text.split()
    if len(words) == 2 and words[0].isdecimal() and _line(int(words[0][:20])) == text:
        return int(words[0])
    if len(words) == 1 and words[0].isascii() and words[0].isdecimal() and len(words[0]) < 10:
        return int(words[0])
    raise ConfigError(
        f"{path} holds {text[:40]!r}, not the count of starts that it should; write the highest incarnation of this "
        "generator in the learner's log there, or give the generator another generator.id"
    )

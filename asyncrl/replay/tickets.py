"""Tickets: what proves, months and restarts later, that this run granted a lease to this process of a generator.

A ticket is the version that the lease was issued under and a keyed MAC (BLAKE2b) over that version, the lease's name,
its holder, the holder's incarnation and the run's name. Results and failures give it back, and beats do for the leases
in hand. Without it whoever is admitted could settle or fail what others work on, or have a restarted learner take over
leases that nobody granted.

The key is made once for each run folder and never leaves it, so that tickets outlive the learner.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import struct
from pathlib import Path

import msgpack

from asyncrl.errors import JournalError
from asyncrl.storage.disk import fsync_folder, write_all
from asyncrl.types import LeaseKey

log = logging.getLogger(__name__)

KEY_FILE = "ticket_key"
KEY_BYTES = 32
_MAC_BYTES = 16
_VERSION = struct.Struct("<q")


class Tickets:
    """Issues and checks the tickets of one run. Without a `key` it makes one that ends with the process."""

    def __init__(self, run_name: str = "", key: bytes | None = None) -> None:
        self._run_name = run_name
        self._key = os.urandom(KEY_BYTES) if key is None else key

    @classmethod
    def of_run(cls, run_dir: Path | str, run_name: str) -> Tickets:
        """Those of a run folder, whose key is made when it is not there. Raises JournalError when the disk fails."""
        path = Path(run_dir) / KEY_FILE
        try:
            return cls(run_name, _read_or_make(path))
        except OSError as error:
            raise JournalError(f"cannot read or write the ticket key {path}: {error}; make it writable") from error

    def issue(self, key: LeaseKey, issued_version: int, holder: str, incarnation: int) -> bytes:
        """The ticket of a lease that is granted to this incarnation of a generator."""
        return _VERSION.pack(issued_version) + self._mac(key, issued_version, holder, incarnation)

    def issued_version(self, ticket: bytes, key: LeaseKey, holder: str, incarnation: int) -> int | None:
        """The version a lease was issued under; None when the ticket is not that of this lease and holder."""
        if len(ticket) != _VERSION.size + _MAC_BYTES:
            return None
        (version,) = _VERSION.unpack_from(ticket)
        expected = self._mac(key, version, holder, incarnation)
        return int(version) if hmac.compare_digest(ticket[_VERSION.size :], expected) else None

    def _mac(self, key: LeaseKey, issued_version: int, holder: str, incarnation: int) -> bytes:
        named = [str(key.kind), key.ordinal, key.attempt, issued_version, holder, incarnation, self._run_name]
        packed: bytes = msgpack.packb(named)
        return hashlib.blake2b(packed, digest_size=_MAC_BYTES, key=self._key, person=b"lease ticket").digest()


def _read_or_make(path: Path) -> bytes:
    if path.exists():
        key = path.read_bytes()
        if len(key) == KEY_BYTES:
            return key
        log.error(
            "%s has %d bytes instead of %d: a new key is made; leases of before are granted again, and results that "
            "are still on their way are refused",
            path,
            len(key),
            KEY_BYTES,
        )
    key = os.urandom(KEY_BYTES)
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        write_all(fd, key)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(new, path)
    fsync_folder(path.parent)
    return key

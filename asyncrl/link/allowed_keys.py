"""Who may speak for whom: the allow-list of the learner, and the keys that its connections proved.

One line of the list is a public key and the ids of the generators that it may speak for; lines that start with "# " are
comments. A key without ids is bound to the first id that it uses, until the learner ends. No other key may use an id
that is listed or bound. The file is read at every handshake and again when it changes: a key that is removed loses its
connections.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.link import limits
from asyncrl.link.curve_keys import AllowedKey, read_allowed_keys

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MAX_PEERS = 4 * limits.MAX_GENERATORS  # connections whose key is remembered; the oldest is forgotten first


class AllowList:
    """The file as it was last read, for the desk's thread; `callback` alone is for the one that admits connections.

    Raises ConfigError when the file cannot be read at the start; later that refuses newcomers and is logged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.edition = 0  # how often the list became another one
        self._keys = _by_key(read_allowed_keys(path))
        self._stamp = _stamp(path)
        self._looked_at = 0.0
        self._complained = False

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a connection with this key is admitted: the answer to libzmq, from the file as it is now."""
        # An error must end in a refusal: an exception would kill the thread and every later handshake with it.
        try:
            return key in _by_key(read_allowed_keys(self._path))
        except ConfigError as error:
            problem = str(error)
        log.error("refusing a generator: %s", problem)
        return False

    def look(self, now: float) -> None:
        """Reads the file again if it changed, once in LOOK_EVERY_S."""
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self.read()

    def read(self) -> None:
        """Reads the file again if it changed. One that cannot be read leaves the connections that are there."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            keys = _by_key(read_allowed_keys(self._path))
        except ConfigError as error:
            if not self._complained:
                log.error("%s; connections that are there stay", error)
            self._complained = True
            return
        self._complained = False
        self._stamp = stamp
        if keys != self._keys:
            self._keys = keys
            self.edition += 1

    def ids_of(self, key: bytes) -> tuple[str, ...] | None:
        """The ids that a key is listed for, none for a bare key; None for a key that is not in the list."""
        return self._keys.get(key)

    def owners_of(self, generator_id: str) -> set[bytes]:
        """The keys that are listed for an id."""
        return {key for key, ids in self._keys.items() if generator_id in ids}


class PeerKeys:
    """Which key each connection proved, and which generator it may say it is."""

    def __init__(self, allowed: AllowList) -> None:
        self._allowed = allowed
        self._edition = allowed.edition
        self._by_peer: OrderedDict[bytes, bytes] = OrderedDict()
        self._bound: dict[str, bytes] = {}  # generator id → the bare key that used it first

    def note(self, peer: bytes, key: bytes) -> bool:
        """A frame came from `peer` over a connection of `key`. False: it counts for nothing.

        A key that was removed counts for nothing, nor does one under the routing id of another key.
        """
        if self._allowed.ids_of(key) is None:
            # Listed since the last look at the file, or removed.
            self._allowed.read()
            if self._allowed.ids_of(key) is None:
                return False
        known = self._by_peer.setdefault(peer, key)
        if len(self._by_peer) > MAX_PEERS:
            self._by_peer.popitem(last=False)
        return known == key

    def refusal(self, peer: bytes, generator_id: str) -> str:
        """Why the key behind `peer` may not speak for this generator; empty when it may, and is bound to it."""
        key = self._by_peer.get(peer, b"")
        ids = self._allowed.ids_of(key)
        if ids is None:
            return "its key is not in transport.allowed_keys_file"
        if ids:
            if generator_id in ids:
                return ""
            return (
                f"its key is listed in transport.allowed_keys_file for {', '.join(ids)}: set generator.id to that, or "
                f"change the line"
            )
        bound = [name for name, owner in self._bound.items() if owner == key]
        if bound and bound != [generator_id]:
            return (
                f"its key spoke for {bound[0]} first: give each generator a key of its own, or write the ids behind "
                "the key in transport.allowed_keys_file"
            )
        if self._allowed.owners_of(generator_id) or self._bound.get(generator_id, key) != key:
            return f"another key speaks for {generator_id}: see transport.allowed_keys_file"
        if not bound:
            self._bound[generator_id] = key
            log.info("a key without an id in transport.allowed_keys_file is bound to %s from now on", generator_id)
        return ""

    def revoked(self, now: float) -> list[bytes]:
        """Connections whose key was removed from the list since the last call."""
        self._allowed.look(now)
        if self._allowed.edition == self._edition:
            return []
        self._edition = self._allowed.edition
        gone = [peer for peer, key in self._by_peer.items() if self._allowed.ids_of(key) is None]
        for peer in gone:
            del self._by_peer[peer]
        return gone


def _by_key(entries: list[AllowedKey]) -> dict[bytes, tuple[str, ...]]:
    """The ids of each key; several lines of one key add up."""
    found: dict[bytes, tuple[str, ...]] = {}
    for entry in entries:
        found[entry.key] = (*found.get(entry.key, ()), *entry.generator_ids)
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced; zeros when it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return status.st_ino, status.st_mtime_ns, status.st_size

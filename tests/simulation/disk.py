"""A disk that forgets: what was written and not fsynced may be gone, in whole or in part, after a loss of power.

Files lie in a real folder, because the code under test opens them by name. `os.fsync` and `os.fdatasync` are replaced:
they note what is durable from then on, and nothing waits for a real disk. `lose_power` then makes of it one of the
states that a file system may leave: each folder with the names of its last fsync or with those of now, each file with
its durable content, its present one, or a part of what was appended in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

Listing = dict[str, int]  # name -> inode


class Disk:
    """Everything below `root`. at_sync(when) is called "before" and "after" each fsync: a moment to be killed at."""

    def __init__(self, root: Path, chance: random.Random, at_sync: Callable[[str], None]) -> None:
        self.root = root
        self.num_syncs = 0
        self.fails = False  # every fsync raises OSError
        self._chance = chance
        self._at_sync = at_sync
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, Listing] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts, what the process fsyncs is durable here."""
        real = os.fsync, os.fdatasync
        os.fsync = os.fdatasync = self.sync
        try:
            yield
        finally:
            os.fsync, os.fdatasync = real

    def sync(self, fd: int) -> None:
        """What is in the file or folder is durable from now on."""
        self._at_sync("before")
        if self.fails:
            raise OSError(errno.EIO, "the simulated disk fails")
        self.num_syncs += 1
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            self._folders[status.st_ino] = _listing(fd)
        else:
            self._files[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()
        self._at_sync("after")

    def durable(self, folder: Path, suffix: str) -> list[bytes]:
        """The durable contents of the files of a folder whose names are durable and end so, in the names' order."""
        names = self._folders.get(folder.stat().st_ino, {}) if folder.is_dir() else {}
        return [self._files.get(names[name], b"") for name in sorted(names) if name.endswith(suffix)]

    def lose_power(self) -> int:
        """Brings the folder into a state that a loss of power could leave. Returns how many files and names changed."""
        folders: dict[int, tuple[Path, Listing]] = {}
        files: dict[int, bytes] = {}
        for where, _, names in os.walk(self.root):
            folders[os.stat(where).st_ino] = Path(where), _listing(where)
            for name in names:
                path = Path(where) / name
                files[path.stat().st_ino] = path.read_bytes()
        tree, changes = self._fate_of_folder(self.root.stat().st_ino, folders, files)
        if changes:
            for path in self.root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            _write(self.root, tree)
        self._forget()
        return changes

    def _fate_of_folder(
        self, inode: int, folders: dict[int, tuple[Path, Listing]], files: dict[int, bytes]
    ) -> tuple[dict[str, object], int]:
        durable = self._folders.get(inode, {})
        present = folders[inode][1] if inode in folders else {}
        tree: dict[str, object] = {}
        changes = 0
        # All names or none: file systems log renames in order, so that no mixture loses both names of a file.
        kept = present if present == durable else self._chance.choice((durable, present))
        changes += kept is not present
        for name, found in sorted(kept.items()):
            if found in self._folders or found in folders:
                tree[name], below = self._fate_of_folder(found, folders, files)
                changes += below
            else:
                tree[name] = self._fate_of_file(self._files.get(found, b""), files.get(found))
                changes += tree[name] != files.get(found)
        return tree, changes

    def _fate_of_file(self, durable: bytes, present: bytes | None) -> bytes:
        if present is None or present == durable:
            return durable
        if present.startswith(durable):
            kept = self._chance.choice((0, len(present), self._chance.randint(len(durable), len(present))))
            return present[: max(kept, len(durable))]
        return self._chance.choice((durable, present))

    def _forget(self) -> None:
        """What is there after a loss of power is on the disk."""
        self._files.clear()
        self._folders.clear()
        for where, _, names in os.walk(self.root):
            self._folders[os.stat(where).st_ino] = _listing(where)
            for name in names:
                path = Path(where) / name
                self._files[path.stat().st_ino] = path.read_bytes()


def _listing(folder: int | str) -> Listing:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


def _write(folder: Path, tree: dict[str, object]) -> None:
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).mkdir(mode=0o700)
            assert isinstance(content, dict)
            _write(folder / name, content)

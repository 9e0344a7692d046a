"""Addresses of the links: what may be listened to, and where the socket file of a run lies."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import BindError
from asyncrl.host.addresses import is_loopback, is_wildcard

IPC_PATH_BYTES = 107  # sun_path on Linux, less its final NUL


@dataclass(frozen=True)
class Address:
    """A parsed address. `host` and `port` are set for tcp (port 0 = any free one), `path` for ipc."""

    text: str
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_tcp(self) -> bool:
        return not self.path

    @property
    def is_loopback(self) -> bool:
        """True when no other host can reach it."""
        return not self.is_tcp or is_loopback(self.host)


def parse_address(text: str) -> Address:
    """Parses tcp://HOST:PORT or ipc://PATH. Raises BindError, also for a wildcard host."""
    scheme, separator, rest = text.partition("://")
    if scheme == "ipc" and separator and rest:
        _check_ipc_path(rest)
        return Address(text, path=rest)
    host, separator, port = rest.rpartition(":")
    if scheme != "tcp" or not separator or not (port == "*" or (port.isdecimal() and int(port) <= 65535)):
        raise BindError(f"address {text!r} must be tcp://HOST:PORT or ipc://PATH")
    host = host.strip("[]")
    if not host or is_wildcard(host):
        raise BindError(f"address {text!r} is a wildcard: name the one private address to listen on")
    if host == "localhost":
        host = "127.0.0.1"
    number = 0 if port == "*" else int(port)
    shown = f"[{host}]" if ":" in host else host
    return Address(f"tcp://{shown}:{number or '*'}", host=host, port=number)


def ipc_address(run_dir: str | Path, name: str) -> str:
    """The address of the run's socket file `name`.

    It lies in the run folder or, where that path is too long for a socket, in a private folder of the
    temporary directory: the same one for every process of this user and run. Raises BindError.
    """
    path = Path(run_dir).resolve() / name
    if len(os.fsencode(path)) <= IPC_PATH_BYTES:
        return f"ipc://{path}"
    tag = hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"asyncrl-{os.getuid()}-{tag}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    # The temporary directory is shared: somebody else's folder of that name must not be trusted.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise BindError(f"{folder} is not a private folder of this user: remove it, or use a shorter run.dir")
    _check_ipc_path(str(folder / name))
    return f"ipc://{folder / name}"


def _check_ipc_path(path: str) -> None:
    size = len(os.fsencode(path))
    if size > IPC_PATH_BYTES:
        raise BindError(f"socket path {path} has {size} bytes, at most {IPC_PATH_BYTES}: use a shorter run.dir")

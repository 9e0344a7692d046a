"""Addresses: the one parser of tcp://HOST:PORT and ipc://PATH, which hosts are this machine, a run's socket files."""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import ipaddress
import os
import re
import socket
import stat
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import BindError, ConfigError

AUTO = "auto"
OFF = "off"
FILE = "file:"
ROLLOUT_SOCKET = "rollouts.sock"
IPC_PATH_BYTES = 107  # sun_path on Linux, less its final NUL

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40  # of one entry: the interface's name in 16 bytes, then a sockaddr
_MAX_INTERFACES = 1024
_BACKLOG = 256  # connections that wait to be accepted

_TCP = re.compile(r"tcp://(\[[^\]]*\]|[^\[\]:/?#@\s]*):([0-9]{1,5}|\*)")


@dataclass(frozen=True)
class Address:
    """A parsed address. `host` and `port` are set for tcp (port 0 = any free one), `path` for ipc."""

    text: str
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_tcp(self) -> bool:
        """Whether it is a network address."""
        return not self.path

    @property
    def is_loopback(self) -> bool:
        """True when no other host can reach it."""
        return not self.is_tcp or is_loopback(self.host)


def parse_address(text: str) -> Address:
    """Parses tcp://HOST:PORT (port 0 or * = any free one; IPv6 in brackets) or ipc://PATH.

    Raises BindError for any other form, for a wildcard host, and for a path that is too long for a socket.
    """
    if text.startswith("ipc://") and len(text) > len("ipc://"):
        path = text.removeprefix("ipc://")
        _check_ipc_path(path)
        return Address(text, path=path)
    parts = _TCP.fullmatch(text)
    port = 0 if parts is None or parts[2] == "*" else int(parts[2])
    if parts is None or port > 65_535:
        raise BindError(f"address {text!r} must be tcp://HOST:PORT or ipc://PATH")
    host = parts[1].strip("[]")
    if not host or is_wildcard(host):
        raise BindError(f"address {text!r} is a wildcard: name the one private address to listen on")
    if host == "localhost":
        host = "127.0.0.1"
    if isinstance(address := ip_address(host), ipaddress.IPv4Address):
        host = str(address)  # an old spelling, such as 127.1, or an IPv4 address inside an IPv6 one
    shown = f"[{host}]" if ":" in host else host
    return Address(f"tcp://{shown}:{port or '*'}", host=host, port=port)


def rollout_address(text: str) -> Address:
    """The value of transport.address: where the learner listens and generators connect.

    Raises ConfigError for anything but tcp://HOST:PORT, for a wildcard host and for a port outside 1..65535.
    """
    parts = _TCP.fullmatch(text)
    if parts is not None and is_wildcard(parts[1]):
        raise ConfigError(
            f"transport.address={text!r} listens on every interface; name the one address of this host "
            "that the generators reach"
        )
    try:
        address = parse_address(text)
    except BindError:
        address = Address(text)
    if not address.is_tcp or not address.port:
        raise ConfigError(
            f"transport.address={text!r} must be tcp://HOST:PORT, for example tcp://127.0.0.1:5770; "
            "the port is a number from 1 to 65535"
        )
    return address


def rollout_addresses(text: str, run_dir: str | Path) -> list[Address]:
    """The addresses that transport.address names, in their order.

        auto                                  the socket file of the run folder, which only its user can reach
        tcp://HOST:PORT, or several           separated by commas; a learner listens on the first of this host
        file:PATH                             the same, read from a file, by lines or commas

    Raises ConfigError for any other form and for a file that cannot be read; BindError when no socket file can be made.
    """
    if text == AUTO:
        return [parse_address(ipc_address(run_dir, ROLLOUT_SOCKET))]
    if text.startswith(FILE):
        path = Path(text.removeprefix(FILE))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"transport.address=file:{path} cannot be read: {error}") from error
    parts = [part for part in text.replace("\n", ",").split(",") if part.strip()]
    return [rollout_address(part.strip()) for part in parts or [text]]


def http_address(text: str, key: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, the value of the configuration key `key`. A host in brackets is IPv6.

    Raises ConfigError for any other form, a wildcard, and a public address: nothing asks a reader who it is.
    """
    try:
        address = parse_address(f"tcp://{text}")
    except BindError as error:
        why = str(error).replace("tcp://", "")
    else:
        where = ip_address(address.host)
        why = f"{address.host} is a public address" if where is not None and where.is_global else ""
        if address.port and not why:
            return address.host, address.port
    raise ConfigError(
        f"{key}={text} must be {AUTO}, {OFF} or HOST:PORT with a loopback or private address of this host, for example "
        f"127.0.0.1:9100{f' ({why})' if why else ''}"
    )


def first_of_this_host(addresses: list[Address]) -> Address:
    """The first address that this host has; the first of all where it has none, so that the bind says why."""
    return next((address for address in addresses if _is_here(address)), addresses[0])


def _is_here(address: Address) -> bool:
    """Whether something on this host could listen at the address, were its port free."""
    if not address.is_tcp:
        return True
    try:
        found = socket.getaddrinfo(address.host, 0, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
    except OSError:
        return False
    return True


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


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    address = ip_address(host)
    return address is not None and address.is_loopback


def is_wildcard(host: str) -> bool:
    """Whether `host` means every interface."""
    address = ip_address(host)
    return host == "*" or (address is not None and address.is_unspecified)


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` spells in any way that a socket would take, with or without brackets; None for a name.

    Examples: `0`, `0x0` and `0.0` are 0.0.0.0, `127.1` is 127.0.0.1, `[::ffff:10.0.0.1]` is 10.0.0.1.
    """
    host = host.strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not (spelled := _numeric_host(host)):
            return None
        address = ipaddress.ip_address(spelled)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def listening_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that listens at one address only; port 0 takes any. Raises OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with contextlib.ExitStack() as on_failure:
        listener = on_failure.enter_context(socket.socket(family, kind, proto))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        on_failure.pop_all()
        return listener


def interface_towards(host: str) -> str | None:
    """The network interface through which this host reaches `host`; None for the loopback, and where none can be told.

    For an address of this host it is the one that has it.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # a datagram socket: nothing is sent, the kernel only picks the route
            own = ip_address(str(probe.getsockname()[0]).partition("%")[0])
    except OSError:
        return None
    return None if own is None or own.is_loopback else _interfaces().get(own)


def _interfaces() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    """Interfaces of this host by the addresses they have."""
    found: dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str] = {}
    room = array.array("B", bytes(_MAX_INTERFACES * _IFREQ_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("iP", len(room), room.buffer_info()[0])
        length = struct.unpack("iP", fcntl.ioctl(asked, _SIOCGIFCONF, request))[0]
    entries = room.tobytes()
    for start in range(0, length, _IFREQ_BYTES):
        name = entries[start : start + 16].partition(b"\0")[0].decode()
        found[ipaddress.IPv4Address(entries[start + 20 : start + 24])] = name.partition(":")[0]  # eth0:1 is on eth0
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        address, *_, name = line.split()
        found[ipaddress.IPv6Address(bytes.fromhex(address))] = name
    return found


def _numeric_host(host: str) -> str:
    """What the C library makes of an address in one of its older spellings, such as `0x7f.1`; empty for a name."""
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST) if host else []
    except (OSError, UnicodeError):
        return ""
    return str(found[0][4][0]) if found else ""


def _check_ipc_path(path: str) -> None:
    size = len(os.fsencode(path))
    if size > IPC_PATH_BYTES:
        raise BindError(f"socket path {path} has {size} bytes, at most {IPC_PATH_BYTES}: use a shorter run.dir")

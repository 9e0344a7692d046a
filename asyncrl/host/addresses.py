"""Reads `tcp://HOST:PORT`: which hosts are only this machine, and which would be every interface."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from asyncrl.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://HOST:PORT`.

    Raises ConfigError for any other form, for a wildcard host and for a port outside 1..65535.
    """
    form = f"transport.address={address!r} must be tcp://HOST:PORT, for example tcp://127.0.0.1:5770"
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ConfigError(f"{form} ({error})") from None
    if parts.scheme != "tcp" or parts.path or parts.query:
        raise ConfigError(form)
    if parts.netloc.startswith("*") or is_wildcard(parts.hostname or ""):
        raise ConfigError(
            f"transport.address={address!r} listens on every interface; name the one address of this host "
            f"that the generators reach"
        )
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{form} ({error})") from None
    if not parts.hostname or not port:
        raise ConfigError(form + "; the port is a number from 1 to 65535")
    return parts.hostname, port


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
    """The address that `host` spells, with or without brackets; None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None

"""CURVE keys: making, reading and checking them. `bin/keys` makes, adds and revokes them (`link.key_commands`).

A key file holds one key in Z85 (40 characters). Secret keys are readable by their owner only. The allow-list holds the
public keys of the generators, one per line, each followed by the ids of the generators that it may speak for; see
`link.allowed_keys`. A key is rotated by adding the new one, restarting the generator with it, and revoking the old one.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from asyncrl.config import TransportConfig
from asyncrl.errors import ConfigError

_MAKE = "make keys with `bin/keys make DIR`"


@dataclass(frozen=True)
class ServerAuth:
    """What the learner needs to admit generators by key."""

    secret_key: bytes
    allowed_keys_file: Path

    def __repr__(self) -> str:
        return f"ServerAuth(allowed_keys_file={str(self.allowed_keys_file)!r})"


@dataclass(frozen=True)
class ClientAuth:
    """What a generator needs to prove itself and to know the learner."""

    secret_key: bytes
    server_public_key: bytes

    def __repr__(self) -> str:
        return f"ClientAuth(server_public_key={self.server_public_key.decode()!r})"


def server_auth(transport: TransportConfig) -> ServerAuth | None:
    """The learner's end of CURVE; None when no key file is configured. Raises ConfigError."""
    files = _both_or_none(transport, "server_key_file", "allowed_keys_file")
    if files is None:
        return None
    auth = ServerAuth(_read_secret("server_key_file", files[0]), Path(files[1]))
    if not read_allowed_keys(auth.allowed_keys_file):
        raise ConfigError(f"transport.allowed_keys_file {files[1]} holds no key: nobody could connect")
    return auth


def client_auth(transport: TransportConfig) -> ClientAuth | None:
    """The generator's end of CURVE; None when no key file is configured. Raises ConfigError."""
    files = _both_or_none(transport, "client_key_file", "server_public_key_file")
    if files is None:
        return None
    server_key = _key(_read("server_public_key_file", files[1]), files[1])
    return ClientAuth(_read_secret("client_key_file", files[0]), server_key)


@dataclass(frozen=True, slots=True)
class AllowedKey:
    """One line of the allow-list: a public key, and the generators that it may speak for."""

    key: bytes
    generator_ids: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.key.decode(), *self.generator_ids))


def read_allowed_keys(path: Path) -> list[AllowedKey]:
    """The lines of an allow-list. Raises ConfigError."""
    # The first word is the key, which may itself contain the character #.
    lines = (line.split() for line in _read("allowed_keys_file", str(path)).splitlines() if line.strip())
    return [AllowedKey(_key(words[0], str(path)), tuple(words[1:])) for words in lines if words[0] != "#"]


def public_key(secret_key: bytes) -> bytes:
    """The public half of a secret key."""
    return zmq.curve_public(secret_key)


def make_key_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Writes NAME.key (secret, mode 0600) and NAME.pub; returns both paths.

    Raises ConfigError when one exists already or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    secret_path, public_path = directory / f"{name}.key", directory / f"{name}.pub"
    for path, key, mode in ((secret_path, secret, 0o600), (public_path, public, 0o644)):
        try:
            # Created with its final mode, so that a secret is never readable by others, not even for a moment.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; keys are never overwritten") from error
        with os.fdopen(handle, "w") as file:
            file.write(key.decode() + "\n")
    return secret_path, public_path


def _both_or_none(transport: TransportConfig, *options: str) -> list[str] | None:
    files = [getattr(transport, option) for option in options]
    if not any(files):
        return None
    for option, path in zip(options, files, strict=True):
        if not path:
            raise ConfigError(f"transport.{option} is empty but {' and '.join(options)} go together; {_MAKE}")
    return files


def _read(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"transport.{option} {path} is not a key file; {_MAKE}") from error
    except OSError as error:
        raise ConfigError(f"transport.{option} {path} cannot be read: {error.strerror}; {_MAKE}") from error


def _read_secret(option: str, path: str) -> bytes:
    text = _read(option, path)
    mode = os.stat(path).st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"transport.{option} {path} has mode {mode:04o}: chmod 600 it, others may read it")
    return _key(text, path)


def _key(text: str, path: str) -> bytes:
    """`text` if it is a key. The text is never part of the error: it may be a secret."""
    key = text.encode()
    try:
        if len(key) == 40 and len(z85.decode(key)) == 32:
            return key
    except (ValueError, KeyError, struct.error):  # all of these mean: not Z85
        pass
    raise ConfigError(f"{path} holds {len(key)} characters that are not a Z85 key of 40; {_MAKE}")

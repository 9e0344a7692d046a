"""The commands `bin/keys make | add | revoke`: the keys of one learner and its generators, in one folder.

    learner.key, learner.pub    the learner's pair
    ID.key, ID.pub              the pair of generator ID
    allowed_keys                the learner's allow-list: the public keys, each with the id that it may speak for

Files are written whole under another name and then renamed, readable by their owner only. A learner that runs takes a
change of the list within a second: who was added may come, and who was revoked is cut off.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.link.curve_keys import AllowedKey, make_key_pair, read_allowed_keys

LEARNER = "learner"
UNNAMED = "generator"  # the pair of a generator whose id is not known yet: bound to the first id that it uses
LIST = "allowed_keys"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def make(folder: Path, generator_ids: list[str]) -> list[str]:
    """Makes the learner's pair and one for each generator, or one that is bound to the first id that it uses.

    Returns what to tell the user. Raises ConfigError; keys are never overwritten.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, _ = make_key_pair(folder, LEARNER)
    _write_list(folder, [])
    told = [f"learner: transport.server_key_file={secret} transport.allowed_keys_file={folder / LIST}"]
    return told + (add(folder, generator_ids) if generator_ids else [_add(folder, UNNAMED, ())])


def add(folder: Path, generator_ids: list[str]) -> list[str]:
    """Makes a pair for each generator and puts it into the list. Returns what to tell the user. Raises ConfigError."""
    return [_add(folder, name, (name,)) for name in generator_ids]


def revoke(folder: Path, generator_ids: list[str]) -> list[str]:
    """Takes the keys of these generators out of the list, with all lines that name them. Raises ConfigError.

    The key files stay, and are worth nothing any more.
    """
    told = []
    for name in generator_ids:
        entries = read_allowed_keys(folder / LIST)
        path = folder / f"{name}.pub"
        public = path.read_bytes().strip() if path.exists() else b""
        kept = [_without(entry, name) for entry in entries if entry.key != public and entry.generator_ids != (name,)]
        if kept == entries:
            raise ConfigError(f"{folder / LIST} has no key of {name}: see its lines for the ids that it has")
        _write_list(folder, kept)
        told.append(f"{name}: revoked; a learner that runs cuts it off within a second")
    return told


def _add(folder: Path, name: str, generator_ids: tuple[str, ...]) -> str:
    if not _ID.fullmatch(name) or name == LEARNER:
        raise ConfigError(f"{name!r} cannot be a generator.id: letters, digits, '.', '_' and '-', and not {LEARNER!r}")
    entries = read_allowed_keys(folder / LIST)
    secret, public = make_key_pair(folder, name)
    _write_list(folder, [*entries, AllowedKey(public.read_bytes().strip(), generator_ids)])
    own_id = f"generator.id={name} " if generator_ids else ""
    return (
        f"{name}: {own_id}transport.client_key_file={secret} "
        f"transport.server_public_key_file={folder / f'{LEARNER}.pub'}"
    )


def _without(entry: AllowedKey, name: str) -> AllowedKey:
    return AllowedKey(entry.key, tuple(other for other in entry.generator_ids if other != name))


def _write_list(folder: Path, entries: list[AllowedKey]) -> None:
    """Replaces the list in one step, so that a learner never reads half of it."""
    written = folder / f".{LIST}.new"
    try:
        with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(f"{entry}\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, folder / LIST)
    except OSError as error:
        raise ConfigError(f"cannot write {folder / LIST}: {error.strerror}") from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="keys", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, says, number in (
        ("make", "make the keys of a learner and of these generators", "*"),
        ("add", "make and admit the keys of more generators", "+"),
        ("revoke", "admit these generators no longer", "+"),
    ):
        command = commands.add_parser(name, help=says)
        command.add_argument("folder", type=Path, help="folder of the keys")
        command.add_argument("generator_ids", nargs=number, metavar="GENERATOR_ID", help="as in generator.id")
    arguments = parser.parse_args()
    act = {"make": make, "add": add, "revoke": revoke}[arguments.command]
    try:
        told = act(arguments.folder, arguments.generator_ids)
    except ConfigError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print("\n".join(told))


if __name__ == "__main__":
    main()

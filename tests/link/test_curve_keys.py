"""Keys: making them, reading them, and what is said when they are wrong."""

from __future__ import annotations

import stat
import subprocess
import sys

import pytest

from asyncrl.config import TransportConfig
from asyncrl.errors import ConfigError
from asyncrl.link.curve_keys import client_auth, make_key_pair, public_key, read_allowed_keys, server_auth


@pytest.fixture
def keys(tmp_path):
    make_key_pair(tmp_path, "learner")
    _, public = make_key_pair(tmp_path, "generator")
    (tmp_path / "allowed_keys").write_text(f"# ours\n\n{public.read_text().strip()} generator\n")
    return tmp_path


def config(folder, **changes) -> TransportConfig:
    files = {
        "server_key_file": "learner.key",
        "server_public_key_file": "learner.pub",
        "client_key_file": "generator.key",
        "allowed_keys_file": "allowed_keys",
    } | changes
    return TransportConfig(**{option: str(folder / name) if name else "" for option, name in files.items()})


def test_made_keys_can_be_loaded_and_belong_together(keys):
    server, client = server_auth(config(keys)), client_auth(config(keys))
    assert client.server_public_key == public_key(server.secret_key)
    assert [entry.key for entry in read_allowed_keys(server.allowed_keys_file)] == [public_key(client.secret_key)]


def test_a_secret_is_readable_by_its_owner_only_and_never_shown(keys):
    mode = (keys / "learner.key").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    server, client = server_auth(config(keys)), client_auth(config(keys))
    assert server.secret_key.decode() not in repr(server)
    assert client.secret_key.decode() not in repr(client)


def test_no_key_files_mean_no_authentication(tmp_path):
    assert server_auth(TransportConfig()) is None and client_auth(TransportConfig()) is None


@pytest.mark.parametrize("option", ["server_key_file", "allowed_keys_file"])
def test_half_of_the_servers_files_is_an_error(keys, option):
    with pytest.raises(ConfigError, match=f"transport.{option} is empty but .* go together"):
        server_auth(config(keys, **{option: ""}))


@pytest.mark.parametrize("option", ["client_key_file", "server_public_key_file"])
def test_half_of_the_clients_files_is_an_error(keys, option):
    with pytest.raises(ConfigError, match=f"transport.{option} is empty but .* go together"):
        client_auth(config(keys, **{option: ""}))


@pytest.mark.parametrize(
    ("load", "option"),
    [
        (server_auth, "server_key_file"),
        (server_auth, "allowed_keys_file"),
        (client_auth, "client_key_file"),
        (client_auth, "server_public_key_file"),
    ],
)
def test_a_missing_file_is_named_with_the_remedy(keys, load, option):
    with pytest.raises(ConfigError, match=rf"transport.{option} .*gone cannot be read: No such file.*bin/keys make"):
        load(config(keys, **{option: "gone"}))


def test_a_secret_that_others_may_read_is_refused(keys):
    (keys / "learner.key").chmod(0o644)
    with pytest.raises(ConfigError, match="learner.key has mode 0644: chmod 600"):
        server_auth(config(keys))


@pytest.mark.parametrize("text", ["", "short", "~" * 40, "#" * 40, "x" * 41])
def test_what_is_not_a_key_is_refused_without_showing_it(keys, text):
    (keys / "generator.key").write_text(text)
    with pytest.raises(ConfigError, match="not a Z85 key") as caught:
        client_auth(config(keys))
    assert not text or text not in str(caught.value)


def test_a_key_may_contain_the_character_of_comments(tmp_path):
    key = "0#000" * 8
    (tmp_path / "allowed").write_text(f"# a comment\n{key} somebody\n")
    assert {entry.key for entry in read_allowed_keys(tmp_path / "allowed")} == {key.encode()}


def test_an_empty_allow_list_is_refused(keys):
    (keys / "allowed_keys").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="nobody could connect"):
        server_auth(config(keys))


def test_keys_are_never_overwritten(keys):
    before = (keys / "learner.key").read_text()
    with pytest.raises(ConfigError, match="File exists; keys are never overwritten"):
        make_key_pair(keys, "learner")
    assert (keys / "learner.key").read_text() == before


def test_the_command_makes_a_working_set_and_says_how_to_use_it(tmp_path):
    command = [sys.executable, "-m", "asyncrl.link.key_commands", "make", str(tmp_path / "keys"), "one", "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    options = TransportConfig(
        **dict(part[10:].split("=") for part in done.stdout.split() if part.startswith("transport."))
    )
    allowed = read_allowed_keys(server_auth(options).allowed_keys_file)
    assert [entry.generator_ids for entry in allowed] == [("one",), ("two",)]
    assert public_key(client_auth(options).secret_key) == allowed[1].key
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "never overwritten" in again.stderr and "Traceback" not in again.stderr

"""A generator's name is its own while it runs, and its incarnation grows at each start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from asyncrl.errors import ConfigError
from asyncrl.generator.identity import claim_identity

HOLDER = """
import sys, time
from pathlib import Path
from asyncrl.generator.identity import claim_identity
identity = claim_identity(Path(sys.argv[1]), "a")
print(identity.incarnation, flush=True)
time.sleep(60)
"""


def test_the_incarnation_grows_by_one_at_each_start(tmp_path):
    for start in (1, 2, 3):
        identity = claim_identity(tmp_path / "generators", "a")
        assert (identity.generator_id, identity.incarnation) == ("a", start)
        identity.lock.close()


def test_a_name_in_use_is_refused_and_its_incarnation_stays(tmp_path):
    first = claim_identity(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"generator.id='a': a running generator holds it.*choose another id"):
        claim_identity(tmp_path, "a")
    first.lock.close()
    assert claim_identity(tmp_path, "a").incarnation == 2


def test_without_a_name_each_gets_the_first_free_one_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    first, second = claim_identity(tmp_path, ""), claim_identity(tmp_path, "")
    assert (first.generator_id, second.generator_id) == ("host-0", "host-1")
    first.lock.close()
    again = claim_identity(tmp_path, "")
    assert (again.generator_id, again.incarnation) == ("host-0", 2)


def test_a_killed_generator_lets_go_of_its_name_but_not_of_its_incarnation(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "1"
    with pytest.raises(ConfigError):
        claim_identity(tmp_path, "a")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert claim_identity(tmp_path, "a").incarnation == 2


def test_a_damaged_file_is_named_with_a_remedy(tmp_path):
    (tmp_path / "a.incarnation").write_text("garbage")
    with pytest.raises(ConfigError, match=r"a\.incarnation holds 'garbage'.*"):
        claim_identity(tmp_path, "a")

"""Learner and generator in two network namespaces with different addresses: two hosts, as far as the network goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.daemons import START_S, STEP_S, Run, free_port

pytestmark = [pytest.mark.netns, pytest.mark.slow]

LEARNER, GENERATOR = "10.213.77.1", "10.213.77.2"
STEPS = 4


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Two namespaces joined by a cable; nothing else can be reached from either. Address -> namespace."""
    names = {address: f"asyncrl-{os.getpid()}-{index}" for index, address in enumerate((LEARNER, GENERATOR))}
    cable = [f"arl{os.getpid() % 10**6}{end}" for end in "ab"]
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for (address, name), end in zip(names.items(), cable, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield names
    remove(names)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def remove(names: dict[str, str]) -> None:
    """The cable goes with its ends."""
    for name in names.values():
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def story(hosts: dict[str, str], module_run: Run) -> tuple[Run, set[str]]:
    """A whole run over the cable, with keys; and where the learner listened in the middle of it.

    The generator has a run folder of its own, as on another host.
    """
    keys = module_run.folder / "keys"
    subprocess.run([sys.executable, "-m", "asyncrl.link.key_commands", "make", str(keys)], check=True, timeout=60)
    module_run.configure(
        run={"steps": STEPS},
        transport={"address": f"tcp://{LEARNER}:{free_port()}"},
        weights={"host": LEARNER},
    )
    learner = module_run.start(
        "learner",
        f"transport.server_key_file={keys / 'learner.key'}",
        f"transport.allowed_keys_file={keys / 'allowed_keys'}",
        inside=("ip", "netns", "exec", hosts[LEARNER]),
    )
    generator = module_run.start(
        "generator",
        f"run.dir={module_run.folder / 'other_host'}",
        f"transport.server_public_key_file={keys / 'learner.pub'}",
        f"transport.client_key_file={keys / 'generator.key'}",
        inside=("ip", "netns", "exec", hosts[GENERATOR]),
    )
    module_run.wait_for_version(1, learner, generator, timeout_s=START_S)
    listeners = listening_addresses(hosts[LEARNER])
    assert learner.exit_code(STEP_S) == 0
    assert generator.exit_code() == 0
    return module_run, listeners


def listening_addresses(host: str) -> set[str]:
    """The IPv4 addresses that somebody listens at in a namespace."""
    command = ["ip", "netns", "exec", host, "cat", "/proc/net/tcp"]
    table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    rows = [line.split() for line in table.splitlines()[1:]]
    found = {row[1].split(":")[0] for row in rows if row[3] == "0A"}
    return {".".join(str(byte) for byte in reversed(bytes.fromhex(address))) for address in found}


def test_the_run_completes_with_weights_proven_over_the_cable(story):
    run, _ = story
    assert run.version() == STEPS
    assert [record["version"] for record in run.records("eval")] == [0, STEPS]
    assert all(record["canary_max_abs_diff"] <= 1e-4 for record in run.records("sync"))


def test_the_learner_listens_at_its_private_address_only(story):
    _, listeners = story
    assert listeners == {LEARNER, "127.0.0.1"}  # on loopback: /healthz and /metrics

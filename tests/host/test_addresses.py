"""Addresses are read by one parser; the rollout link takes fewer of them."""

from __future__ import annotations

import socket

import psutil
import pytest

from asyncrl.errors import BindError, ConfigError
from asyncrl.host.addresses import (
    Address,
    interface_towards,
    is_loopback,
    is_wildcard,
    parse_address,
    rollout_address,
)

NO_ADDRESS = [
    "",
    "tcp://",
    "tcp://[::1",
    "tcp://::1:5",
    "ipc://",
    "tcp://a:b",
    "tcp://a:1/x",
    "tcp://me@a:1",
]
NO_ROLLOUT_ADDRESS = [*NO_ADDRESS, "tcp://:5", "ipc:///tmp/x", "tcp://a:*", "tcp://a:0", "tcp://a:65536"]


@pytest.mark.parametrize("text", NO_ADDRESS)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(BindError, match="must be tcp://HOST:PORT or ipc://PATH"):
        parse_address(text)


def test_addresses_are_split_into_host_and_port():
    assert parse_address("tcp://10.0.0.1:5770") == Address("tcp://10.0.0.1:5770", "10.0.0.1", 5770)
    assert parse_address("tcp://[::1]:80") == Address("tcp://[::1]:80", "::1", 80)
    assert (
        parse_address("tcp://localhost:*")
        == parse_address("tcp://localhost:0")
        == Address("tcp://127.0.0.1:*", "127.0.0.1")
    )
    assert parse_address("ipc:///tmp/x") == Address("ipc:///tmp/x", path="/tmp/x")
    assert rollout_address("tcp://10.0.0.1:5770") == parse_address("tcp://10.0.0.1:5770")


@pytest.mark.parametrize("text", NO_ROLLOUT_ADDRESS)
def test_what_the_rollout_link_cannot_have_is_refused(text):
    with pytest.raises(ConfigError, match="transport.address"):
        rollout_address(text)


def test_loopback_and_wildcard_hosts_are_told_apart():
    assert [is_loopback(host) for host in ("localhost", "127.9.9.9", "::1", "10.0.0.1", "node7")] == [
        True, True, True, False, False
    ]  # fmt: skip
    assert [is_wildcard(host) for host in ("*", "0.0.0.0", "::", "127.0.0.1", "node7")] == [
        True, True, True, False, False
    ]  # fmt: skip


def test_the_interface_towards_an_address_of_this_host_is_the_one_that_has_it():
    found = {
        address.address: interface
        for interface, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    }
    assert {address: interface_towards(address) for address in found} == {
        address: None if is_loopback(address) else interface for address, interface in found.items()
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "no-such-host.invalid"])
def test_there_is_no_interface_towards_the_loopback_or_nowhere(host):
    assert interface_towards(host) is None

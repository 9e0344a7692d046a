"""The pages of a daemon over real sockets: what they say, and that no reader holds anybody up."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncrl.errors import ConfigError
from asyncrl.metrics import StepMetrics, http_server
from asyncrl.metrics.exposition import Exposition
from asyncrl.metrics.health import STALL_S, DaemonState, Pulse
from asyncrl.metrics.http_pages import HttpPages, Vitals
from asyncrl.metrics.http_server import MAX_CLIENTS, is_local_name
from tests.waits import LATE_S, wait_until


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Served:
    """Pages at an address, and the pulse behind them."""

    def __init__(self, folder, address="auto", daemon="learner"):
        self.clock = Clock()
        self.pulse = Pulse(self.clock)
        vitals = Vitals(daemon, "blue", self.pulse, Exposition(StepMetrics))
        self.pages = HttpPages.open(address, "learner.http", vitals, folder)
        self.told = folder / "http" / f"{daemon}.json"

    def get(self, path, method="GET"):
        with contextlib.closing(http.client.HTTPConnection(*self.pages.address, timeout=10)) as connection:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def health(self):
        status, text = self.get("/healthz")
        return status, json.loads(text)


@pytest.fixture
def serve(tmp_path):
    with contextlib.ExitStack() as closing:

        def serve(*args, **kwargs):
            served = Served(tmp_path, *args, **kwargs)
            closing.callback(served.pages.close)
            return served

        yield serve


def test_health_is_the_age_of_the_last_turn_and_not_what_was_said_once(serve):
    served = serve()
    assert served.health()[1]["state"] == "starting"
    served.pulse.turn(DaemonState.WAITING, "rollouts", ready=True)
    served.clock.now += STALL_S - 1
    status, told = served.health()
    assert (status, told["state"], told["waits_for"], told["ready"]) == (200, "waiting", "rollouts", True)
    assert told["loop_age_s"] == STALL_S - 1
    served.clock.now += 1
    status, told = served.health()
    assert (status, told["loop_turns"]) == (503, False)
    served.pulse.turn(DaemonState.TRAINING, ready=True)
    assert served.health()[0] == 200


def test_the_page_of_metrics_is_readable_and_says_who_and_how(serve):
    served = serve()
    served.pulse.turn(DaemonState.TRAINING, ready=True)
    status, text = served.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert status == 200
    assert families["asyncrl_info"].samples[0].labels["run"] == "blue"
    assert families["asyncrl_state"].samples[0].labels == {"state": "training"}
    assert families["process_resident_memory_bytes"].samples[0].value > 2**20
    assert families["process_cpu_seconds"].type == "counter"


def test_other_pages_methods_and_nonsense_are_refused(serve):
    served = serve()
    assert served.get("/")[0] == 404
    assert served.get("/healthz", "POST")[0] == 405
    assert served.get("/healthz?verbose=1")[0] == 200
    status, text = served.get("/metrics", "HEAD")
    assert (status, text) == (200, "")
    for nonsense in (b"\x16\x03\x01" * 100 + b"\r\n\r\n", b"GET\r\n\r\n", b"a" * 20_000):
        with socket.create_connection(served.pages.address, timeout=10) as client:
            client.sendall(nonsense)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass
    assert served.get("/healthz")[0] == 200


def test_readers_that_say_nothing_are_cut_off_and_never_in_the_way(serve, monkeypatch):
    served = serve()
    silent = [socket.create_connection(served.pages.address, timeout=10) for _ in range(MAX_CLIENTS + 8)]
    began = time.monotonic()
    assert [served.get("/healthz")[0] for _ in range(20)] == [200] * 20
    assert time.monotonic() - began < http_server.CLIENT_TIMEOUT_S, "nobody waits for those who say nothing"
    for client in silent:
        client.close()


def test_a_reader_that_takes_nothing_ends_at_its_deadline(serve, monkeypatch):
    monkeypatch.setattr(http_server, "CLIENT_TIMEOUT_S", 0.3)
    served = serve()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(served.pages.address)
        client.sendall(b"GET /healthz HTTP/1.1\r\n")  # and never the end of it
        client.settimeout(10)
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert time.monotonic() - began < 5 + LATE_S
    wait_until(lambda: not served.pages.server.clients, "the end of the exchange")


def test_the_address_is_written_where_prometheus_reads_it_and_goes_with_the_daemon(serve):
    served, other = serve(), serve(daemon="generator-a")
    (entry,) = json.loads(served.told.read_text())
    host, port = served.pages.address
    assert entry["targets"] == [f"{host}:{port}"]
    assert host == "127.0.0.1"
    assert {"run": "blue", "daemon": "learner"}.items() <= entry["labels"].items()
    assert other.pages.address != served.pages.address
    served.pages.close()
    assert not served.told.exists()
    assert other.told.exists()
    assert not any(thread is served.pages.server.thread for thread in threading.enumerate())
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(served.pages.address, timeout=5)


def test_a_port_that_is_taken_is_a_sentence_and_off_is_nothing(serve, tmp_path):
    host, port = serve().pages.address
    with pytest.raises(ConfigError, match=rf"learner.http={host}:{port} cannot be had here \(Address already in use\)"):
        serve(f"{host}:{port}")
    vitals = Vitals("learner", "blue", Pulse(), Exposition(StepMetrics))
    assert HttpPages.open("off", "learner.http", vitals, tmp_path) is None


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost", "LOCALHOST:1", "[::1]:9", "127.8.9.1", "[::1]"])
def test_names_of_this_host_that_no_site_can_own(host):
    assert is_local_name(host)


@pytest.mark.parametrize(
    "host", ["", "example.org", "127.0.0.1.example.org", "localhost.example.org:80", "10.0.0.1", "[::2]"]
)
def test_other_names_are_not_local(host):
    assert not is_local_name(host)

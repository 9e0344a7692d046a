"""A run that is watched: over real sockets, while its file grows."""

import contextlib
import http.client
import signal
import socket
import subprocess
import sys

import pytest

from asyncrl.errors import BindError, UserError
from asyncrl.metrics import METRICS_FILE
from asyncrl.metrics.sinks import JsonlSink
from asyncrl.report.watch import LOOKED_AT_S, Watch
from tests.report.pages import Page
from tests.report.runs import step, whole, write_run


class Clock:
    """Stands still unless it is told to go on: making a page takes no time."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(tmp_path, clock):
    write_run(tmp_path, whole(5))
    with contextlib.closing(Watch(tmp_path, clock=clock)) as watch:
        yield watch


def get(watch, path="/", **headers):
    """Status, headers and text of an answer."""
    host, port = watch.url.removeprefix("http://").rstrip("/").split(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=10)) as connection:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def grow(folder, *versions):
    sink = JsonlSink(folder / METRICS_FILE)
    for version in versions:
        sink.write(step(version))
    sink.close()


def last_step(text):
    return Page(text).data["step"]


def test_the_page_is_served_on_loopback_and_follows_the_run(watch, tmp_path):
    assert watch.url.startswith("http://127.0.0.1:")
    status, headers, text = get(watch)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert Page(text).root.one("html").attributes["data-live"] == "yes"
    status, headers, text = get(watch, "/main")
    assert (status, last_step(text)) == (200, 5)
    grow(tmp_path, 6, 7)
    assert watch.turn()
    assert last_step(get(watch)[2]) == 7
    assert not watch.turn(), "nothing new"


def test_who_has_the_newest_is_sent_nothing(watch, tmp_path):
    tag = get(watch, "/main")[1]["ETag"]
    assert get(watch, "/main", If_None_Match=tag)[::2] == (304, "")
    grow(tmp_path, 6)
    watch.turn()
    status, headers, text = get(watch, "/main", If_None_Match=tag)
    assert (status, last_step(text)) == (200, 6) and headers["ETag"] != tag


def test_a_page_that_nobody_looks_at_is_not_made(watch, tmp_path, clock):
    grow(tmp_path, 6)
    clock.now += LOOKED_AT_S + 1
    assert not watch.turn()
    assert last_step(get(watch, "/main")[2]) == 5
    assert watch.turn(), "somebody asked"
    assert last_step(get(watch, "/main")[2]) == 6


def test_a_line_that_is_still_being_written_waits_for_its_end(watch, tmp_path):
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "step", "version": 6, ')
    assert not watch.turn()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('"reward_mean": 0.5}\n')
    assert watch.turn()
    assert last_step(get(watch)[2]) == 6


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_site_whose_name_points_here_is_refused(watch, host):
    status, _, text = get(watch, Host=host)
    assert status == 403 and watch.url.rstrip("/") in text


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/../etc/passwd", 404), ("/main?x=1", 200)])
def test_there_are_two_pages(watch, path, status):
    assert get(watch, path)[0] == status


def test_a_folder_that_is_no_run_and_a_port_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        Watch(tmp_path)
    write_run(tmp_path, [step(1)])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BindError, match="cannot be had on 127.0.0.1"):
        Watch(tmp_path, taken.getsockname()[1])
    with pytest.raises(BindError, match="give a number from 1 to 65535"):
        Watch(tmp_path, 70_000)


def test_the_command_says_where_it_is_and_ends_with_a_signal(tmp_path):
    write_run(tmp_path, whole(3))
    command = [sys.executable, "-m", "asyncrl.cli.main", "watch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line and "Ctrl-C" in line
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()

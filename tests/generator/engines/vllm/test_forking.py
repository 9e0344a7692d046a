"""A process that is forked from a daemon: what it has of the daemon's, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from asyncrl.generator.engines.vllm.forking import may_fork
from asyncrl.generator.engines.vllm.options import EngineOptions

# A daemon with a lock, a socket, a pipe to a child and handlers of its own; what it forks tells what it has of them.
DAEMON = """
import fcntl, logging, multiprocessing.connection, os, signal, socket, sys, threading, time
from asyncrl.generator.engines.vllm.forking import METHOD, forked_engine

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece: two processes write here

folder = sys.argv[1]
lock = open(folder + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted, _ = server.accept()
reading, writing = os.pipe()
logging.basicConfig(filename=folder + "/log", level="INFO")
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

def engine(kind):
    try:
        os.write(client.fileno(), b"x")  # goes nowhere: the number is taken, the connection is not
        logging.info("logged by the engine")
        say("engine", os.getpid(), os.environ[METHOD], os.getsid(0) == os.getpid())
    except BaseException as error:
        say(error)
    if kind == "ends":
        return
    time.sleep(600)

with forked_engine():
    process = multiprocessing.get_context(os.environ[METHOD]).Process(target=engine, args=sys.argv[2:])
    process.start()
if sys.argv[2] == "ends":
    process.join()
    say(process.exitcode, os.environ[METHOD])
    sys.exit()
os.close(writing)
say("pipe", os.read(reading, 1))  # returns when the last copy of the other end is closed
accepted.setblocking(False)
try:
    say("socket", accepted.recv(1))
except BlockingIOError:
    say("socket empty")
say("ended", multiprocessing.connection.wait([process.sentinel], 0))
multiprocessing.connection.wait([process.sentinel], 600)
process.join()
say("the end is seen:", process.exitcode)
"""


@pytest.fixture
def daemon(tmp_path):
    """Starts the daemon; the caller reads what it and its fork print."""
    started = []

    def start(kind: str) -> subprocess.Popen[str]:
        script = tmp_path / "daemon.py"
        script.write_text(DAEMON)
        command = [sys.executable, str(script), str(tmp_path), kind]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_child(process: subprocess.Popen[str], num_lines: int = 4) -> psutil.Process:
    """The fork, after the first lines of both have come and say what they must."""
    lines = dict(process.stdout.readline().rstrip().split(" ", 1) for _ in range(num_lines))
    pid, method, leads_session = lines.pop("engine").split()
    assert (method, leads_session) == ("spawn", "True"), "what it starts itself is spawned; signals pass it by"
    assert lines in ({}, {"pipe": "b''", "socket": "empty", "ended": "[]"}), (
        "the fork has a copy of the daemon's pipe or connection"
    )
    return psutil.Process(int(pid))


def test_a_fork_holds_nothing_of_the_daemon_and_ends_with_it(daemon, tmp_path):
    process = daemon("stays")
    child = read_child(process)
    held = {os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd")}
    assert not any(name.startswith("socket:") or name.endswith("/lock") for name in held), held
    assert "logged by the engine" in (tmp_path / "log").read_text()
    process.kill()
    process.wait()
    psutil.wait_procs([child], timeout=10.0)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_sees_the_end_of_its_fork_which_has_none_of_its_signal_handlers(daemon, number):
    process = daemon("stays")
    child = read_child(process)
    child.send_signal(number)
    assert process.stdout.readline() == f"the end is seen: {-number}\n"


def test_a_fork_that_returns_ends_well(daemon):
    process = daemon("ends")
    read_child(process, num_lines=1)
    assert process.stdout.readline() == "0 spawn\n"


def test_only_a_process_without_torch_forks_and_only_one_worker_on_a_cpu(monkeypatch):
    assert "torch" in sys.modules or not monkeypatch.setitem(sys.modules, "torch", sys)
    assert not may_fork(EngineOptions("model"))
    monkeypatch.delitem(sys.modules, "torch")
    assert may_fork(EngineOptions("model"))
    assert not may_fork(EngineOptions("model", device="cuda"))
    assert not may_fork(EngineOptions("model", tensor_parallel_size=2))
    assert not may_fork(EngineOptions("model", fork=False))

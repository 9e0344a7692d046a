"""The trainer as a child: started again with back-off, given up after too many deaths, gone with its desk.

The configuration file does not exist, so the real rank dies at once, and says so in its log.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config.loading import load_config, to_yaml
from asyncrl.desk.trainer_process import MAX_BACKOFF_S, RESTART_BACKOFF_S, RankLayout, TrainerProcess
from asyncrl.errors import BindError, ConfigError, RankLost, TrainerFailed
from tests.trainer.tiny import save_tiny_model
from tests.waits import wait_until

DEADLINE_S = 60.0

DESK = """
import signal, sys
from pathlib import Path
from asyncrl.desk.trainer_process import TrainerProcess
folder = Path(sys.argv[1])
counts = {"threads": 1, "max_restarts": 0}
trainer = TrainerProcess(folder / "missing", "ipc:///nowhere", folder / "log", weights_timeout_s=5.0, **counts)
trainer.start()
print(trainer.pid, flush=True)
signal.pause()
"""

BUSY_THREAD = """
import threading
import torch
from asyncrl.host.processes import leave

working = threading.Barrier(5)

def work():
    torch.ones(1000).sum()
    working.wait()
    while True:
        torch.ones(1000).sum()

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
working.wait()
print("last words", end="")
leave({code})
"""


def make(folder: Path, max_restarts: int, **seams: Any) -> TrainerProcess:
    return TrainerProcess(
        folder / "missing.yaml",
        "ipc:///nowhere",
        folder / "trainer.log",
        threads=1,
        max_restarts=max_restarts,
        weights_timeout_s=7.0,
        **seams,
    )


@pytest.fixture
def trainer(tmp_path):
    trainer = make(tmp_path, max_restarts=1)
    trainer.start()
    yield trainer
    trainer.kill()


def test_a_death_is_told_once_and_followed_by_a_restart_after_the_back_off(trainer):
    assert trainer.running
    assert not trainer.poll(0.0)
    first = trainer.pid
    trainer.kill()
    assert trainer.poll(0.0)
    assert not trainer.poll(RESTART_BACKOFF_S / 2)
    assert not trainer.running
    assert not trainer.poll(RESTART_BACKOFF_S)
    assert trainer.running
    assert trainer.pid != first


def test_a_trainer_starts_with_the_deadline_of_weight_channels(tmp_path):
    """torch reads it once, at the first collective of the process."""
    trainer = make(tmp_path, max_restarts=0)
    trainer.start()
    environment = Path(f"/proc/{trainer.pid}/environ").read_bytes().split(b"\0")
    assert b"TORCH_NCCL_NONBLOCKING_TIMEOUT=6" in environment
    trainer.kill()


def test_too_many_deaths_without_a_step_end_the_learner_with_the_last_words_of_the_trainer(tmp_path):
    trainer = make(tmp_path, max_restarts=0)
    trainer.start()
    wait_until(lambda: not trainer.running, "the rank's end: its configuration is missing", DEADLINE_S)
    with pytest.raises(TrainerFailed, match=r"died 1 times.*\n(.|\n)*missing\.yaml: there is no such"):
        trainer.poll(0.0)


def test_what_the_user_set_up_wrongly_ends_the_learner_at_once_with_the_trainers_sentence(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    overrides = [
        f"model.path={folder}",
        f"run.dir={tmp_path / 'run'}",
        "update.what=partial",
        "update.names=[nobody.*]",
    ]
    trainer = make(tmp_path, max_restarts=3)
    trainer.config_file.write_text(to_yaml(load_config(None, overrides)))
    trainer.start()
    wait_until(lambda: not trainer.running, "the rank's end: no parameter has that name", DEADLINE_S)
    with pytest.raises(ConfigError, match=r"^update\.names: 'nobody\.\*' matches no parameter"):
        trainer.poll(0.0)


def test_a_step_in_between_wipes_out_earlier_deaths(trainer):
    for death in range(3):
        trainer.kill()
        assert trainer.poll(100.0 * death)
        trainer.poll(100.0 * death + RESTART_BACKOFF_S)
        assert trainer.running
        trainer.stepped()


def test_the_back_off_doubles_up_to_its_limit(tmp_path):
    trainer = make(tmp_path, max_restarts=8)
    now, delays = 0.0, []
    for _ in range(7):
        trainer.start()
        trainer.kill()
        assert trainer.poll(now)
        delays.append(trainer._restart_at - now)
        trainer._restart_at = None
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, MAX_BACKOFF_S, MAX_BACKOFF_S]


def test_no_trainer_outlives_a_desk_that_was_killed(tmp_path):
    desk = subprocess.Popen([sys.executable, "-c", DESK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert desk.stdout is not None
    pid = int(desk.stdout.readline())
    os.kill(pid, signal.SIGSTOP)  # so that it cannot end by itself
    desk.kill()
    desk.wait()
    desk.stdout.close()
    wait_until(lambda: gone(pid), f"the end of trainer {pid}", DEADLINE_S)


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


@pytest.mark.parametrize("code", [0, 6])
def test_a_thread_that_is_inside_torch_does_not_change_the_exit_code(code):
    program = BUSY_THREAD.format(code=code)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "last words", "")


def test_killing_a_trainer_that_is_gone_does_nothing(trainer):
    trainer.kill()
    trainer.kill()
    assert not trainer.running
    assert trainer.wait(1.0) == -signal.SIGKILL


def test_a_trainer_that_ignores_its_kill_is_waited_for_with_a_deadline(tmp_path, caplog):
    """As one does that sits in a system call which hangs; here it is stopped and not killed."""

    def stop(group: int, _: int) -> None:
        os.killpg(group, signal.SIGSTOP)

    trainer = make(tmp_path, max_restarts=1, kill_timeout_s=0.1, signal_group=stop)
    trainer.start()
    try:
        trainer.kill()
        assert "does not end 0.1 s after SIGKILL" in caplog.text
        with pytest.raises(TrainerFailed, match="did not end well"):
            trainer.check_end()
    finally:
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait(DEADLINE_S)


def test_a_missing_log_is_said_and_not_raised(tmp_path):
    assert "no trainer log" in make(tmp_path, 0).last_words()


# -- several ranks

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("3", str(rank))
print("fd", rank, "ASYNCRL_STORE_FD" in os.environ, os.environ["MASTER_PORT"], flush=True)
{body}
signal.pause()
"""


class ScriptedRanks(TrainerProcess):
    """Three ranks, each of which does what `body` says."""

    body = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", RANK.format(body=self.body)]


def ranks(folder: Path, body: str, **seams: Any) -> TrainerProcess:
    ScriptedRanks.body = body
    return ScriptedRanks(
        folder / "c", "ipc:///nowhere", folder / "trainer.log", layout=RankLayout(count=3, world_size=3), threads=1,
        max_restarts=1, weights_timeout_s=7.0, **seams,
    )  # fmt: skip


@pytest.fixture
def scripted(tmp_path):
    made = []

    def make_ranks(body: str, **seams: Any) -> TrainerProcess:
        made.append(ranks(tmp_path, body, **seams))
        made[-1].start()
        return made[-1]

    yield make_ranks
    for trainer in made:
        trainer.kill()


def until_dead(trainer: TrainerProcess) -> None:
    wait_until(lambda: trainer.poll(0.0), "the trainer's death", DEADLINE_S)


def test_one_killed_rank_ends_all_and_is_named(scripted, caplog):
    trainer = scripted("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)")
    until_dead(trainer)
    assert not trainer.running
    assert "trainer died (rank 1: exit code -9 (SIGKILL))" in caplog.text
    trainer.poll(RESTART_BACKOFF_S)
    assert trainer.ranks.running
    assert trainer.failures == 1


def test_the_rank_at_fault_is_named_and_not_those_that_lost_it(scripted, caplog):
    lost = RankLost.exit_code
    until_dead(scripted(f"time.sleep(0.3 * (rank == 2)); sys.exit(3 if rank == 2 else {lost})"))
    assert "trainer died (rank 2: exit code 3)" in caplog.text


def test_ranks_that_do_not_notice_are_killed_and_named(scripted, caplog):
    trainer = scripted(f"if rank == 0: sys.exit({RankLost.exit_code})")
    until_dead(trainer)
    assert not trainer.running
    assert "killing ranks that did not notice and may hang: [1, 2]" in caplog.text


def test_ranks_that_all_end_well_have_exit_code_0(scripted):
    trainer = scripted("sys.exit(0)")
    assert trainer.wait(DEADLINE_S) == 0
    trainer.check_end()


def test_a_rank_that_stays_behind_at_the_end_is_seen(scripted):
    trainer = scripted("if rank != 2: sys.exit(0)")
    wait_until(lambda: trainer.ranks.running == [2], "the end of two", DEADLINE_S)
    assert trainer.exit_code is None
    assert trainer.running
    with pytest.raises(TrainerFailed, match="did not end well"):
        trainer.check_end()


def test_rank_0_alone_gets_the_socket_at_which_all_meet(scripted):
    trainer = scripted("sys.exit(0)")
    trainer.wait(DEADLINE_S)
    lines = sorted(trainer.log_file.read_text().splitlines())
    assert [line.split()[:3] for line in lines] == [["fd", "0", "True"], ["fd", "1", "False"], ["fd", "2", "False"]]
    assert len({line.split()[3] for line in lines}) == 1


def test_a_port_that_is_taken_is_said_with_the_keys(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        layout = RankLayout(count=2, world_size=2, port=taken.getsockname()[1])
        with pytest.raises(BindError, match=r"cannot meet at 127.0.0.1.*learner\.port"):
            TrainerProcess(
                tmp_path / "c", "ipc:///n", tmp_path / "log", layout=layout, threads=1, max_restarts=0,
                weights_timeout_s=7.0,
            ).start()  # fmt: skip

"""A forked process is to a test what a new interpreter is."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waits import wait_until
from tests.warm_processes import WarmProcess, run_warm

DEADLINE_S = 60.0
ROOT = Path(__file__).resolve().parents[1]
PIPE = subprocess.PIPE


def test_it_has_its_own_arguments_environment_folder_and_streams(tmp_path):
    code = "import os, sys; print(sys.argv[1:], dict(os.environ), os.getcwd(), sys.stdin.read())"
    process = WarmProcess([sys.executable, "-c", code, "a", "b"], stdin=PIPE, stdout=PIPE, env={"A": "1"}, cwd=tmp_path)
    process.stdin.write("said")
    process.stdin.close()
    assert process.stdout.read() == f"['a', 'b'] {{'A': '1'}} {tmp_path} said\n"
    process.stdout.close()
    assert process.wait(DEADLINE_S) == process.returncode == 0


def test_its_imports_were_made_before():
    code = "import sys, time; print('torch' in sys.modules, 'asyncrl.trainer.rank' in sys.modules, time.process_time())"
    process = WarmProcess([sys.executable, "-c", code], stdout=PIPE)
    known, rank_known, spent_s = process.stdout.read().split()
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 0
    assert (known, rank_known) == ("True", "True")
    assert float(spent_s) < 1.0


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "import os; os._exit(3)"])
def test_its_exit_code_is_seen(code):
    process = WarmProcess([sys.executable, "-c", code])
    assert process.wait(DEADLINE_S) == 3


def test_an_exception_is_printed_and_ends_it_with_1(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = WarmProcess([sys.executable, "-c", "raise ValueError('this one')"], stderr=log)
        assert process.wait(DEADLINE_S) == 1
    assert "ValueError: this one" in (tmp_path / "log").read_text()


def test_one_that_waits_is_killed():
    process = WarmProcess([sys.executable, "-c", "import signal; signal.pause()"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    process.kill()
    assert process.wait(DEADLINE_S) == -signal.SIGKILL
    process.kill()  # gone: nothing happens


def test_one_that_is_run_to_its_end_gives_what_it_said_and_its_code():
    code = "import sys; print('said'); print('why', file=sys.stderr); sys.exit(3)"
    done = run_warm([sys.executable, "-c", code], timeout_s=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "why\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_warm([sys.executable, "-c", "import signal; signal.pause()"], timeout_s=0.01)


def test_one_that_was_left_stopped_does_not_keep_its_parent():
    code = """
import os, signal, subprocess, sys
from tests.warm_processes import CONTEXT, WarmProcess
if __name__ == "__main__":
    CONTEXT.set_forkserver_preload([])
    process = WarmProcess([sys.executable, "-c", "print(1, flush=True); import signal; signal.pause()"], stdout=-1)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    print(process.pid)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=PIPE, text=True, cwd=ROOT, timeout=DEADLINE_S)
    assert done.returncode == 0
    wait_until(lambda: gone(int(done.stdout)), "the end of the process")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_modules_and_files_are_run(tmp_path):
    (tmp_path / "said.py").write_text("import sys\nif __name__ == '__main__':\n    print(__file__, *sys.argv[1:])\n")
    for command in (["-m", "said"], [str(tmp_path / "said.py")]):
        process = WarmProcess([sys.executable, *command, "x"], stdout=PIPE, cwd=tmp_path)
        assert Path(process.stdout.readline().split()[0]) == tmp_path / "said.py"
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 0

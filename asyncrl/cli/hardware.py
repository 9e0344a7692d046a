"""The machine that a forecast is compared with: the one here, or one that `--for` names."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from asyncrl.config.gpus import ASK_TIMEOUT_S, plain_uuid, visible_gpus
from asyncrl.errors import ConfigError

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
EXAMPLE = 'for example --for "gpu=80GiB,gpus=8,host=512GiB,disk=2TiB"'
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one machine has, in bytes. None: not known, or not named."""

    gpus: int
    gpu_bytes: int | None  # of each
    host_bytes: int | None
    disk_bytes: int | None
    is_here: bool


def parse_hardware(text: str) -> Hardware:
    """The machine that `--for` names: sizes of gpu, host and disk, and the number of gpus (1 where gpu is given).

    Raises ConfigError.
    """
    sizes: dict[str, int] = {}
    gpus: int | None = None
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (part.strip() for part in entry.partition("="))
        size = _SIZE.fullmatch(value)
        if name == "gpus" and value.isdecimal():
            gpus = int(value)
        elif name in ("gpu", "host", "disk") and size:
            sizes[name] = int(float(size[1]) * UNITS[size[2].lower()])
        else:
            raise ConfigError(
                f"--for {text!r}: {entry!r} is none of gpu=SIZE, gpus=NUMBER, host=SIZE, disk=SIZE; {EXAMPLE}"
            )
    if not sizes and gpus is None:
        raise ConfigError(f"--for {text!r} names nothing; {EXAMPLE}")
    if gpus is None:
        gpus = 1 if "gpu" in sizes else 0
    return Hardware(gpus, sizes.get("gpu"), sizes.get("host"), sizes.get("disk"), is_here=False)


def hardware_here(run_dir: str) -> Hardware:
    """The machine here: its GPUs, the memory that is available now, and what is free where the run would write."""
    folder = Path(run_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    visible = visible_gpus()
    gpu_bytes = _gpu_bytes(visible) if visible else None
    return Hardware(len(visible), gpu_bytes, available_bytes(), shutil.disk_usage(existing).free, is_here=True)


def available_bytes() -> int | None:
    """Memory that processes can take now: MemAvailable, or what a control group leaves; None where nothing says."""
    limits = [number for number in (_mem_available(), _group_limit()) if number is not None]
    return min(limits, default=None)


def _mem_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _group_limit() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else None


def _gpu_bytes(visible: list[str]) -> int | None:
    """Memory of the smallest of these GPUs, asked of the driver's tool: torch takes seconds to import."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(",") for line in done.stdout.splitlines()]
    sizes = {plain_uuid(row[0]): int(row[1]) * 2**20 for row in rows if len(row) == 2 and row[1].strip().isdecimal()}
    return min((size for uuid, size in sizes.items() if uuid in visible), default=min(sizes.values(), default=None))

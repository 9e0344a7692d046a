"""The NVIDIA GPUs that a daemon started here can use, and what each is called, without torch: its import takes seconds.

GPUs are told apart by their UUIDs: numbers mean other cards in another process, and the same ones on another host.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each card, named by its place on the bus
ASK_TIMEOUT_S = 20.0

version = functools.cache(importlib.metadata.version)  # which reads and parses a file of 10 kB each time


def has_gpu() -> bool:
    """Whether a daemon started here can use a GPU."""
    return bool(visible_gpus())


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none where torch is built for CPUs alone.

    Numbers there follow the bus, see CUDA_DEVICE_ORDER in `asyncrl.host.processes`. A number or name that leads nowhere
    ends the list, and one that comes twice empties it, as in CUDA.
    """
    if not _torch_has_cuda():
        return []
    installed = installed_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    visible: list[str] = []
    for token in chosen.split(","):
        uuid = _uuid_of(token.strip(), installed)
        if uuid is None:
            break
        visible.append(uuid)
    return visible if len(set(visible)) == len(visible) else []


def installed_gpus() -> list[str]:
    """UUIDs of all GPUs whose device this process can open, by their place on the bus."""
    found = []
    for folder in sorted(DRIVER.iterdir()) if DRIVER.is_dir() else ():
        told = _told_by_driver(folder / "information")
        if "GPU UUID" in told and (DEVICES / f"nvidia{told.get('Device Minor')}").exists():
            found.append(plain_uuid(told["GPU UUID"]))
    return found or _asked_of_tool()


def plain_uuid(text: str) -> str:
    """A UUID as torch writes it; the driver and its tools put `GPU-` before it."""
    return text.strip().lower().removeprefix("gpu-")


def _torch_has_cuda() -> bool:
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _told_by_driver(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _asked_of_tool() -> list[str]:
    """What nvidia-smi says, where the driver shows nothing in /proc, as on Windows; names without a UUID at worst."""
    devices = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    if not devices and not (DEVICES / "dxg").exists():
        return []
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return devices or ["dxg"]
    return [plain_uuid(line) for line in done.stdout.splitlines() if line.startswith("GPU-")] or devices or ["dxg"]


def _uuid_of(token: str, installed: list[str]) -> str | None:
    """The GPU that one entry of CUDA_VISIBLE_DEVICES means: a number, the beginning of a UUID, or a part of a GPU."""
    if token.isdecimal():
        return installed[int(token)] if int(token) < len(installed) else None
    if token.startswith("MIG-"):
        return token.lower()
    if not token.startswith("GPU-"):
        return None
    matching = [uuid for uuid in installed if uuid.startswith(plain_uuid(token))]
    return matching[0] if len(matching) == 1 else None

"""Which GPUs a daemon can use: what the driver shows in /proc and /dev, and what CUDA_VISIBLE_DEVICES leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncrl.config import gpus

UUIDS = [f"{number}8cb5dbb-e5ea-4c4a-9b8c-000000000000" for number in range(4)]


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with four GPUs, the bus order of which is not that of their minor numbers, and torch for CUDA."""
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "gpus")
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(gpus, "version", lambda name: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "dev").mkdir()
    for number, minor in enumerate([2, 0, 1, 3]):
        folder = tmp_path / "gpus" / f"0000:{0x10 * number + 0x0A:02x}:00.0"
        folder.mkdir(parents=True)
        told = f"Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-{UUIDS[number].upper()}\nDevice Minor: \t {minor}\n"
        (folder / "information").write_text(told)
        (tmp_path / "dev" / f"nvidia{minor}").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3, 1", [3, 1]),
        ("2,9,1", [2]),  # as CUDA: what follows a number that leads nowhere is not seen
        ("1,1", []),
        ("GPU-28cb5dbb,0", [2, 0]),
    ],
)
def test_the_environment_chooses_among_the_cards_of_the_host(host, monkeypatch, chosen, expected):
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible_gpus() == [UUIDS[index] for index in expected]
    assert gpus.has_gpu() is bool(expected)


def test_a_part_of_a_card_has_a_name_of_its_own(host, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0123")
    assert gpus.visible_gpus() == ["mig-0123"]


def test_a_card_whose_device_a_container_does_not_have_is_not_there(host):
    (host / "dev" / "nvidia0").unlink()
    assert gpus.visible_gpus() == [UUIDS[0], UUIDS[2], UUIDS[3]]


@pytest.mark.parametrize("build", ["2.13.0+cpu", None])
def test_torch_for_cpus_has_no_gpu_whatever_the_host_shows(host, monkeypatch, build):
    def version(name):
        if build is None:
            raise gpus.PackageNotFoundError(name)
        return build

    monkeypatch.setattr(gpus, "version", version)
    assert gpus.visible_gpus() == []


def test_the_tool_is_asked_where_the_driver_shows_nothing(host, monkeypatch):
    monkeypatch.setattr(gpus, "DRIVER", host / "nothing")
    assert gpus.visible_gpus() == [
        "nvidia0",
        "nvidia1",
        "nvidia2",
        "nvidia3",
    ]  # no tool either
    tool = host / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 'GPU-{UUIDS[3]}'\n")
    tool.chmod(0o755)
    assert gpus.visible_gpus() == [UUIDS[3]]


def test_a_host_without_devices_has_none(host, monkeypatch):
    for path in (host / "dev").iterdir():
        path.unlink()
    assert gpus.visible_gpus() == []


@pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")) or "CUDA_VISIBLE_DEVICES" in os.environ, reason="this host has a GPU"
)
def test_this_host_has_none():
    assert gpus.visible_gpus() == []

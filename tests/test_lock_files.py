"""The lock files agree with pyproject.toml, with each other and with what is installed."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
KINDS = ["cpu", "cuda"]
UNWANTED = {"torchvision", "torchaudio", "torchcodec"}  # they break a CPU torch, see requirements-common.lock


def pins(path: Path) -> list[tuple[str, str]]:
    """Name and version of every line, included files too. Raises ValueError for a line that is no exact pin."""
    found = []
    for line in path.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found += pins(path.parent / text[3:])
        elif text:
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)={2,3}([A-Za-z0-9.+]+)", text)
            if match is None:
                raise ValueError(f"{path.name}: {text!r} is not name==version")
            found.append((canonicalize_name(match[1]), match[2]))
    return found


def lock(kind: str) -> dict[str, str]:
    return dict(pins(ROOT / f"requirements-{kind}.lock"))


def unmet(requirements: list[str], locked: dict[str, str]) -> list[str]:
    """The requirements that no pin meets. Markers are evaluated for this machine."""
    wanted = [Requirement(text) for text in requirements]
    return [
        str(requirement)
        for requirement in wanted
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        and not requirement.specifier.contains(locked.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_pinned_twice(kind):
    names = [name for name, _ in pins(ROOT / f"requirements-{kind}.lock")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_dependency_of_the_project_is_pinned_within_its_range(kind):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert unmet(project["dependencies"] + extras[kind] + extras["dev"] + extras["benchmarks"], lock(kind)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_packages_that_break_a_cpu_torch_stay_out(kind):
    assert UNWANTED.isdisjoint(lock(kind))


def test_a_missing_and_a_misfitting_pin_are_seen():
    assert unmet(["torch>=2.13", "rich>=14", "numpy"], {"rich": "13.0", "numpy": "2.3"}) == ["torch>=2.13", "rich>=14"]


def test_a_loose_line_in_a_lock_file_is_refused(tmp_path):
    (tmp_path / "loose.lock").write_text("numpy>=2\n")
    with pytest.raises(ValueError, match="numpy>=2"):
        pins(tmp_path / "loose.lock")


def test_what_is_installed_is_what_the_lock_says():
    kind = "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"
    # Not all of sys.path: packages that others carry inside them (setuptools does) are not what is installed.
    places = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    found = metadata.distributions(path=places)
    installed = {canonicalize_name(package.metadata["Name"]): package.version for package in found}
    wanted = lock(kind)
    del wanted["pip"]  # the installer may be whichever came with Python
    assert {name: installed.get(name) for name in wanted} == wanted


def test_the_locked_packages_need_nothing_that_is_not_locked():
    """--no-deps installs no missing piece, so the list must be closed under what its members require."""
    kind = "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"
    locked = lock(kind)
    left_out = UNWANTED | {"triton", "cwevals"}
    missing = {}
    for name in locked:
        requires = [text for text in metadata.requires(name) or [] if Requirement(text).name not in left_out]
        if found := unmet(requires, locked):
            missing[name] = found
    assert missing == {}


def test_setup_refuses_an_unknown_kind_and_names_the_known_ones():
    done = subprocess.run([ROOT / "bin/setup", "tpu"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "cpu or cuda" in done.stderr and "tpu" in done.stderr

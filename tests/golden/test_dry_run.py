"""What `--dry-run` of both commands prints for each configuration file, but for what the machine decides.

Data: make_data.py.
"""

import os
import re

import pytest

from tests.golden import product
from tests.golden.stored import DRY_RUN, ROOT
from tests.model_folders import make_model_folder

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
ROLES = ["generator", "learner"]
SIZE = r"[\d.]+ (?:B|KiB|MiB|GiB)"


def normalised(text, folder):
    """The output without the machine's memory, disk, ports and folders."""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(rf"(this host has available +){SIZE}", r"\1SIZE", text)
    text = re.sub(rf"(free there +){SIZE}", r"\1SIZE", text)
    return re.sub(r"; (free now|NOT available now \(.*\))$", "; PORT", text, flags=re.MULTILINE)


def dry_run(config, role, folder, monkeypatch):
    """Normalised output on a machine of two CPUs, with a GPU where the configuration wants one."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    path = ROOT / "configs" / f"{config}.yaml"
    product.pretend_gpu(monkeypatch, "device: cuda" in path.read_text(encoding="utf-8"))
    model = make_model_folder(folder / "model")
    code, output = product.run_dry(role, [str(path), f"model.path={model}"])
    assert code == 0
    return normalised(output, folder)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_output_is_the_stored_one(config, role, tmp_path, monkeypatch):
    stored = (DRY_RUN / f"{config}.{role}.txt").read_text(encoding="utf-8")
    assert dry_run(config, role, tmp_path, monkeypatch) == stored


def test_no_output_is_stored_for_a_configuration_that_is_gone():
    assert {path.name for path in DRY_RUN.iterdir()} == {f"{name}.{role}.txt" for name in CONFIGS for role in ROLES}

"""What `--dry-run` of both commands prints for each configuration file and a named machine.

Data: make_data.py.
"""

import pytest

from asyncrl.cli import dry_run as dry_run_module
from tests.golden import product
from tests.golden.stored import DRY_RUN, ROOT
from tests.model_folders import make_model_folder

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
ROLES = ["generator", "learner"]
HARDWARE = "gpu=80GiB,gpus=8,host=64GiB,disk=1TiB"


def dry_run(config, role, folder, monkeypatch):
    """Output for a named machine. The task is not tried: two of the configurations need data that is elsewhere."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(dry_run_module, "_task", lambda config, *rest: [("path", config.task.path)])
    path = ROOT / "configs" / f"{config}.yaml"
    model = make_model_folder(folder / "model")
    code, output = product.run_dry(role, [str(path), f"model.path={model}", "--for", HARDWARE])
    assert code == 0
    return output.replace(str(folder), "FOLDER")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_output_is_the_stored_one(config, role, tmp_path, monkeypatch):
    stored = (DRY_RUN / f"{config}.{role}.txt").read_text(encoding="utf-8")
    assert dry_run(config, role, tmp_path, monkeypatch) == stored


def test_no_output_is_stored_for_a_configuration_that_is_gone():
    assert {path.name for path in DRY_RUN.iterdir()} == {f"{name}.{role}.txt" for name in CONFIGS for role in ROLES}

"""Ranks that read their slices of a model hold what they would of a model loaded whole, in the memory of a slice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.host.model_folder import find_model
from tests.trainer.ranks.loading_cases import save_model
from tests.trainer.ranks.processes import ROOT, run_world

PROGRAM = "tests.trainer.ranks.loading_program"
# One rank has all cases, see tests/trainer/engines/test_stored_weights.py.
SIZES = {
    2: ("several files", "lora in bfloat16", "own critic", "experts, partial"),
    3: ("bfloat16 passes", "lora", "shared critic"),
}


def seen_by(size: int, folder: Path, *arguments: str):
    run_world(size, PROGRAM, [str(folder), *arguments], folder / "log", 250.0)
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    found = {}
    for size, names in SIZES.items():
        folder = tmp_path_factory.mktemp("loading")
        for name in names:
            save_model(name, folder / name)
        found[size] = seen_by(size, folder, "bits", *names)
    return found


@pytest.mark.bits
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in SIZES.items() for name in names])
def test_slices_from_files_are_those_of_a_model_loaded_whole(seen, size, name):
    assert [rank[name] for rank in seen[size]] == [[]] * size


@pytest.mark.parametrize("size", SIZES)
def test_ranks_pack_rows_if_all_of_them_can(seen, size):
    """Those that do and those that do not would make other collectives."""
    assert [rank["packed"] for rank in seen[size]] == [[True, False]] * size


def make_models(folder: Path) -> None:
    """In a process of its own, whose memory is not that of the ranks."""
    code = (
        "import sys; from pathlib import Path; from tests.trainer.tiny import save_tiny_model\n"
        "folder = Path(sys.argv[1]); save_tiny_model(folder / 'small')\n"
        "save_tiny_model(folder / 'large', hidden=512, layers=16, vocab=512)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, timeout=120, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "least", "most"), [("slices", 0.4, 0.7), ("whole", 1.2, 2.5)])
def test_a_rank_of_two_needs_the_memory_of_its_half(tmp_path, way, least, most):
    """Of a model in many layers: a pass puts one of them together. The old way is the control of the measurement."""
    make_models(tmp_path)
    whole_bytes = 4 * find_model(str(tmp_path / "large")).num_parameters()
    assert whole_bytes > 120e6
    for grown in seen_by(2, tmp_path, "peak", way):
        assert least < grown[way] / whole_bytes < most

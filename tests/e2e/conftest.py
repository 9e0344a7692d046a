"""Fixtures of the end-to-end tests: runs that leave no process behind, and the models they need."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tests.e2e.daemons import Run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A run that others share is made in the first test that asks for it: on a busy machine that takes minutes."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="module")
def module_run(tied_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that the tests of one module share."""
    run = Run(tmp_path_factory.mktemp("run"), tied_model_dir)
    yield run
    run.close()


@pytest.fixture
def make_run(tied_model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs of a test's own."""
    runs: list[Run] = []

    def make(model_dir: Path | None = None) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", model_dir or tied_model_dir))
        return runs[-1]

    yield make
    for run in runs:
        run.close()

"""The page by axe-core, as accessibility audits use it. Its script comes with a package that no run needs."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.report.browser import BROWSER, VIEWS, WHY_NOT, browser
from tests.report.full_run import OPEN_TWO_TABLES, full_run

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def axe_file() -> Path | None:
    """axe.min.js: at ASYNCRL_AXE, or in the package axe-playwright-python, of which nothing is imported."""
    if given := os.environ.get("ASYNCRL_AXE"):
        return Path(given)
    package = importlib.util.find_spec("axe_playwright_python")
    return Path(package.origin).with_name("axe.min.js") if package and package.origin else None


AXE = axe_file()

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=WHY_NOT),
    pytest.mark.skipif(AXE is None, reason="no axe-core: pip install --no-deps axe-playwright-python==0.1.8"),
]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """Opens the page in a view, with some tables open, and returns what axe finds."""
    folder = tmp_path_factory.mktemp("axe")
    page = full_run(folder / "run")
    with browser(folder / "profile") as window:

        def audit(view):
            window.open(page, **VIEWS[view])
            window.evaluate(OPEN_TWO_TABLES)
            window.frame()
            window.evaluate(f"{AXE.read_text(encoding='utf-8')};0")
            rules = "found.violations.map(rule => [rule.id, rule.help, rule.nodes.map(node => node.html.slice(0, 99))])"
            told = f"({{ passed: found.passes.length, violations: {rules} }})"
            return window.evaluate(f"axe.run(document, {{ runOnly: {RULES} }}).then(found => {told})")

        yield audit


@pytest.mark.parametrize("view", ["desk", "dark", "phone"])
def test_axe_finds_no_violation(audited, view):
    found = audited(view)
    assert found["violations"] == []
    assert found["passed"] > 25

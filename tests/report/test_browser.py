"""The page in a real browser, where there is one: its script runs under its own policy, and charts can be read out."""

import shutil
import subprocess

import pytest

from asyncrl.report.writing import report
from tests.report.pages import Page
from tests.report.runs import whole, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here (Debian, Ubuntu: apt install chromium)")
def test_the_script_runs_and_makes_charts_readable_by_keys(tmp_path, capsys):
    path = report(write_run(tmp_path / "run", whole(50)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    drawings = Page(done.stdout).root.all("svg", of="drawing")
    assert len(drawings) > 8
    assert all(drawing.attributes["role"] == "slider" and drawing.attributes["tabindex"] == "0" for drawing in drawings)

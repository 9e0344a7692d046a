"""`asyncrl rollouts` as a user meets it: what it prints, with colours and without, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from asyncrl.cli import main as program
from asyncrl.report.rollouts.files import file_of, write_file
from asyncrl.types import LeaseKind
from tests.report.rollouts.making import HOSTILE, make_record


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    for kind, version in ((LeaseKind.TRAIN, 1), (LeaseKind.TRAIN, 20), (LeaseKind.EVAL, 0)):
        records = [make_record(n, kind=kind, version=version, reward=n / 10, completion=f"said {n}") for n in range(6)]
        write_file(file_of(folder, kind, version), [record.to_line() for record in records], 10**6)
    return tmp_path / "run"


@pytest.fixture
def here(capsys):
    """Runs the command in this process; its code, and what it printed."""

    def run_here(*arguments):
        try:
            code = program.main(["rollouts", *map(str, arguments)])
        except SystemExit as end:  # as argparse ends
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_here


def titles(text):
    return [line.split("  reward")[0] for line in text.splitlines() if line.startswith(("step", "evaluation"))]


def test_it_shows_the_newest_step_without_colours_where_there_is_no_terminal(here, run_dir):
    code, out, err = here(run_dir)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert titles(out)[:2] == [f"step 20  prompt {n}  rollout 2  best" for n in (5, 0)]
    assert len(titles(out)) == 3


def test_counts_steps_evaluations_and_prompts_are_as_asked_for(here, run_dir):
    assert [title.split()[3] for title in titles(here(run_dir, "--worst", 2, "--best", 1)[1])] == ["5", "0", "1"]
    assert titles(here("--step", 1, run_dir, "--best", 1)[1]) == ["step 1  prompt 5  rollout 2  best"]
    assert titles(here(run_dir, "--prompt", 3)[1]) == ["step 20  prompt 3  rollout 2  best"]
    assert titles(here(run_dir, "--eval", "--worst", 1)[1]) == ["evaluation of version 0  prompt 0  rollout 2  best"]
    assert len(titles(here(run_dir, "--sample", 100)[1])) == 6


def test_json_is_the_lines_of_the_file(here, run_dir):
    code, out, _ = here(run_dir, "--json", "--best", 2)
    lines = (run_dir / "rollouts" / "step_20.jsonl").read_text().splitlines()
    assert code == 0
    assert out.splitlines() == [lines[5], lines[4]]
    assert json.loads(out.splitlines()[0])["ordinal"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the run.dir of a run, for example: asyncrl rollouts runs/quickstart"),
        (["RUN", "--step", "7"], "not of step 7, but of steps 1, 20; evaluations 0"),
        (["RUN", "--eval", "--step", "1"], "not of evaluation 1, but of steps 1, 20; evaluations 0"),
        (["RUN", "--prompt", "9"], "no rollout of prompt 9; it has prompts 0, 1, 2, 3, 4, 5"),
        (["RUN", "--worst", "-1"], "--worst -1: give 0 or more"),
        (["RUN", "--color", "red"], "invalid choice: 'red'"),
        (["RUN/none"], "there is no such folder"),
        (["RUN/rollouts"], "holds no rollouts"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line_with_exit_code_2(here, run_dir, arguments, message):
    code, out, err = here(*(argument.replace("RUN", str(run_dir)) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1


def test_lines_that_cannot_be_read_are_counted_and_the_others_shown(here, run_dir):
    with (run_dir / "rollouts" / "step_20.jsonl").open("ab") as file:
        file.write(b'{"schema": 1, "kind": "tr')
    code, out, err = here(run_dir)
    assert code == 0 and len(titles(out)) == 3
    assert "1 lines cannot be read; " in err and "step_20.jsonl, line 7: " in err


def on_a_terminal(*arguments, **environment):
    """What the command writes to a pseudo-terminal."""
    reader, writer = os.openpty()
    values = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    values |= {"TERM": "xterm-256color", "PYTHONUTF8": "1", **environment}
    command = [sys.executable, "-m", "asyncrl.cli.main", "rollouts", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=writer, env=values)
    os.close(writer)
    chunks = []
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # the end, on Linux
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(reader)
    assert process.wait(60.0) == 0
    return b"".join(chunks).decode()


def test_a_terminal_gets_colours_unless_the_user_wants_none(run_dir):
    assert "\x1b[38;5;16;48;5;" in on_a_terminal(run_dir)
    assert "\x1b" not in on_a_terminal(run_dir, NO_COLOR="1")
    assert "\x1b[38" not in on_a_terminal(run_dir, "--color", "none")


def test_a_terminal_is_not_written_to_by_what_the_model_said(run_dir):
    file = file_of(run_dir / "rollouts", LeaseKind.TRAIN, 30)
    record = make_record(version=30, prompt=HOSTILE, completion=HOSTILE, token_texts=[HOSTILE, "", "", ""])
    write_file(file, [record.to_line()], 10**6)
    for arguments in ([], ["--json"], ["--color", "mismatch"]):
        written = on_a_terminal(run_dir, *arguments)
        for control in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\x00", "\u202e", "\x7f"):
            assert control not in written
        assert "\r" not in written.replace("\r\n", "\n")


def test_a_reader_who_leaves_early_gets_no_traceback(run_dir):
    command = f"{sys.executable} -m asyncrl.cli.main rollouts {run_dir} --sample 6 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith("step 20")


def test_the_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "rollouts" in capsys.readouterr().out

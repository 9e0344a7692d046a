"""`asyncrl report` and `asyncrl compare` as commands; `asyncrl watch` is in tests/report/test_watch.py."""

import pytest

from asyncrl.cli.main import main
from asyncrl.report.page.document import PAGE_FILE
from asyncrl.report.summary import SUMMARY_FILE
from tests.report.runs import whole, write_run


@pytest.fixture
def asyncrl(capsys):
    """Runs the command; its exit code, and what it printed."""

    def asyncrl(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:  # as argparse ends
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return asyncrl


def test_report_writes_both_files_and_names_the_page_last(asyncrl, tmp_path):
    run = write_run(tmp_path / "run", whole(12))
    code, out, err = asyncrl("report", run)
    assert (code, err) == (0, "")
    assert out.startswith("12 steps in ") and out.splitlines()[-1].split() == ["report", str(run / PAGE_FILE)]
    assert (run / PAGE_FILE).is_file() and (run / SUMMARY_FILE).is_file()


def test_compare_prints_the_table_and_writes_the_page_where_it_is_told_to(asyncrl, tmp_path, monkeypatch):
    runs = [write_run(tmp_path / name, whole(12)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    code, out, err = asyncrl("compare", *runs)
    assert (code, err, out.splitlines()[-1]) == (0, "", "compare.html")
    assert "reward, last steps" in out and (tmp_path / "compare.html").is_file()
    code, out, _ = asyncrl("compare", *runs, "--output", tmp_path / "x.html")
    assert code == 0 and (tmp_path / "x.html").is_file()


@pytest.mark.parametrize("command", [["report"], ["watch"], ["compare", "other"]])
def test_a_folder_that_is_no_run_is_exit_code_2_and_a_sentence(asyncrl, tmp_path, command):
    code, out, err = asyncrl(*command, tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "there is no such file; give the run.dir of a run that has started" in err


@pytest.mark.parametrize(
    "arguments", [["report"], ["watch"], ["compare"], ["report", "a", "b"], ["watch", "a", "--port", "x"]]
)
def test_wrong_arguments_are_exit_code_2_and_say_where_help_is(asyncrl, arguments):
    code, _, err = asyncrl(*arguments)
    assert code == 2 and f"see asyncrl {arguments[0]} --help" in err


def test_a_place_that_cannot_be_written_is_named(asyncrl, tmp_path):
    runs = [write_run(tmp_path / name, whole(2)) for name in ("a", "b")]
    code, _, err = asyncrl("compare", *runs, "--output", tmp_path / "no" / "x.html")
    assert code == 2 and "No such file or directory" in err and "x.html" in err


def test_a_run_may_be_given_by_its_name_in_runs(asyncrl, tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "blue", whole(3))
    monkeypatch.chdir(tmp_path)
    code, out, _ = asyncrl("report", "blue")
    assert code == 0 and out.splitlines()[-1].endswith("runs/blue/report.html")

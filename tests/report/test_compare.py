"""Several runs beside each other: the table, the settings in which they differ, the page."""

import json

import pytest

from asyncrl.errors import UserError
from asyncrl.report.compare import MAX_RUNS, SETTINGS_FILE, compare, comparison_page, table
from asyncrl.report.page.document import page
from tests.report.pages import Page
from tests.report.runs import step, whole, write_run


@pytest.fixture
def make(tmp_path):
    def make(name, *metrics, settings=None):
        folder = write_run(tmp_path / name, metrics)
        if settings is not None:
            said = {"settings": [[key, value] for key, value in settings.items()], "forked_from": "", "finished": -1}
            (folder / SETTINGS_FILE).write_text(json.dumps(said))
        return folder

    return make


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.startswith(row)]
    return line.removeprefix(row).split()


def test_the_table_has_a_column_for_each_run(make):
    text = table(compare([make("a", *whole(100)), make("b", *whole(20, rollouts_failed={"deadline": 2}))]))
    assert text.splitlines()[0].split() == ["a", "b"]
    assert cells(text, "steps ") == ["100", "20"]
    assert cells(text, "reward, last steps") == ["0.955", "0.195"]
    assert cells(text, "evaluation, last") == ["0.875", "0.875"]
    assert cells(text, "tokens/s generated") == ["500", "500"]
    assert cells(text, "rollouts failed") == ["0", "40"]
    assert len({len(line) for line in text.splitlines()}) == 1, "columns are aligned"


def test_settings_that_differ_are_named_and_those_of_each_run_are_not(make):
    first = make("a", step(1), settings={"run.name": "a", "learner.lr": "1e-4", "run.seed": "0", "only.here": "x" * 99})
    second = make("b", step(1), settings={"run.name": "b", "learner.lr": "3e-4", "run.seed": "0"})
    compared = compare([first, second])
    assert compared.settings == {"learner.lr": ["1e-4", "3e-4"], "only.here": ["x" * 59 + "…", "–"]}
    assert cells(table(compared), "learner.lr") == ["1e-4", "3e-4"]


def test_runs_without_settings_or_with_damaged_ones_are_compared_by_their_figures(make, caplog):
    first, second = make("a", step(1)), make("b", step(1))
    (second / SETTINGS_FILE).write_text('{"settings": 3}')
    assert compare([first, second]).settings == {}
    assert [SETTINGS_FILE in record.getMessage() for record in caplog.records] == [True]


def test_runs_of_one_name_are_told_apart_by_the_folder_above(make):
    assert compare([make("x/run", step(1)), make("y/run", step(1)), make("other", step(1))]).names == [
        "x/run",
        "y/run",
        "other",
    ]


def test_the_page_has_each_run_in_its_color_on_every_chart(make):
    compared = compare([make("a", *whole(10)), make("<b>", *whole(30))])
    document = Page(page(comparison_page(compared)))
    reward = document.root.one("figure", id="reward")
    labels = [entry.one("span").text for entry in reward.one("ul").all("li")]
    assert labels == ["a", "a: held-out", "<b>", "<b>: held-out"]
    colors = [entry.one("path").attributes["class"].split()[1] for entry in reward.one("ul").all("li")]
    assert colors == ["c0", "c0", "c1", "c1"]
    curves = document.data["charts"]["reward"]["curves"]
    assert [len(document.data["grids"][curve["grid"]]["step"]) for curve in curves] == [10, 2, 30, 2]
    assert document.data["step"] == 30
    rows = document.root.one("section", id="figures").all("tr")
    assert [cell.text.strip() for cell in rows[0].all("th")] == ["a", "<b>"]
    assert not document.root.all("b", id="b") and "rounds" not in document.data["charts"]


@pytest.mark.parametrize("count", [0, 1, MAX_RUNS + 1])
def test_too_few_and_too_many_are_refused(make, count):
    folder = make("a", step(1))
    with pytest.raises(UserError, match=f"give 2 to {MAX_RUNS} runs, not {count}"):
        compare([folder] * count)

"""The page of metrics and alarms: complete, and up to date with the types."""

import subprocess
import sys
from dataclasses import fields

import pytest

from asyncrl.metrics import glossary
from asyncrl.metrics.alarms import RULES
from asyncrl.metrics.declaring import LINE, REPORT, SUMMARY
from asyncrl.metrics.exposition import families_of
from asyncrl.metrics.generator_metrics import GeneratorMetrics
from asyncrl.metrics.ledger import GeneratorActivity, LearnerActivity
from asyncrl.metrics.types import DERIVED, EvalMetrics, StepMetrics, SyncMetrics

KINDS = [StepMetrics, SyncMetrics, EvalMetrics, GeneratorMetrics]


def all_entries():
    return [entry for kind in KINDS for entry in glossary.entries(kind)] + list(glossary.derived_entries())


def test_the_page_shows_what_the_types_declare():
    text = glossary.README.read_text(encoding="utf-8")
    assert text == glossary.page(text), "run `python -m asyncrl.metrics.glossary --write`"


def test_every_metric_activity_and_alarm_has_a_row():
    rows = glossary.glossary().splitlines()
    names = [entry.name for kind in KINDS for entry in fields(kind)] + list(DERIVED) + [rule.figure for rule in RULES]
    names += [family.name for kind in KINDS for family, _ in families_of(kind).values() if family.kind == "counter"]
    names += [str(activity) for kind in (LearnerActivity, GeneratorActivity) for activity in kind]
    assert len([row for row in rows if row.startswith("| `")]) == len(names)
    for name in names:
        assert any(row.startswith(f"| `{name}` |") for row in rows), name


def test_every_metric_has_a_unit_one_sentence_and_known_places():
    for entry in all_entries():
        assert entry.unit, entry.name
        assert entry.sentence.endswith("."), entry.name
        assert set(entry.shown) <= {LINE, SUMMARY, REPORT, "alarm"}, entry.name


def test_bars_do_not_cut_a_row_of_the_table():
    header, *rows = [line for line in glossary.glossary().splitlines() if line.startswith("|")]
    assert len(header.replace("\\|", "").split("|")) == 6
    assert {len(row.replace("\\|", "").split("|")) for row in rows} == {
        4,
        5,
        6,
        8,
    }  # activities have 2 columns, counters 3, metrics 4, alarms 6


def test_text_around_the_tables_is_kept_and_missing_markers_are_named():
    page = glossary.page(f"before\n{glossary.BEGIN}\nold\n{glossary.END}\nafter\n")
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "\nold\n" not in page
    assert glossary.page(page) == page
    with pytest.raises(ValueError, match="lacks its marker lines"):
        glossary.page("no markers")


def test_it_prints_as_a_module_and_refuses_other_arguments(capsys):
    command = [sys.executable, "-m", "asyncrl.metrics.glossary"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, glossary.glossary() + "\n", "")
    assert glossary.main(["--help"]) == 2
    assert "usage: python -m asyncrl.metrics.glossary" in capsys.readouterr().err

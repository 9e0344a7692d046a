"""The tables of metrics and alarms in README.md, made from their declarations.

`python -m asyncrl.metrics.glossary` prints them; with `--write` it puts them into README.md, between two marker lines.
A test compares the two, so that the page never lags behind the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from asyncrl.metrics.alarms import RULES, AlarmRule
from asyncrl.metrics.exposition import Record, families_of
from asyncrl.metrics.generator_metrics import GeneratorMetrics
from asyncrl.metrics.ledger import Activity, GeneratorActivity, LearnerActivity
from asyncrl.metrics.types import DERIVED, EvalMetrics, StepMetrics, SyncMetrics

README = Path(__file__).with_name("README.md")
BEGIN = "<!-- glossary: written by `python -m asyncrl.metrics.glossary --write` -->"
END = "<!-- glossary: end -->"

USAGE = "usage: python -m asyncrl.metrics.glossary [--write]"


@dataclass(frozen=True, slots=True)
class GlossaryEntry:
    """One metric as the page shows it. `shown` names the places: line, summary, report, alarm."""

    name: str
    unit: str
    sentence: str
    shown: tuple[str, ...]


def entries(kind: type[Record]) -> Iterator[GlossaryEntry]:
    """Every field of one class of metrics, in the order of its declaration."""
    for entry in fields(kind):
        shown = (*entry.metadata["shown"], *_alarm_on(entry.name, kind))
        yield GlossaryEntry(entry.name, entry.metadata["unit"], entry.metadata["sentence"], shown)


def derived_entries() -> Iterator[GlossaryEntry]:
    """The figures of a step that are worked out from its fields."""
    for name, derived in DERIVED.items():
        sentence = getattr(StepMetrics, name).__doc__ or ""
        yield GlossaryEntry(
            name, derived.unit, " ".join(sentence.split()), (*derived.shown, *_alarm_on(name, StepMetrics))
        )


def glossary() -> str:
    """The generated part of README.md: a table for each kind of line, for activities, derived figures, and alarms."""
    blocks = []
    for kind in (StepMetrics, SyncMetrics, EvalMetrics):
        blocks.append(f'### Lines with `"kind": "{kind.kind}"`')
        blocks.extend(_paragraphs(kind.__doc__ or ""))
        blocks.append(_metrics_table(entries(kind)))
    blocks.append('### Derived figures, written into the lines with `"kind": "step"`')
    blocks.append(_metrics_table(derived_entries()))
    for title, activities in (("learner_time_s", LearnerActivity), ("generator_time_s", GeneratorActivity)):
        blocks.append(f"### Activities in `{title}`")
        blocks.extend(_paragraphs(activities.__doc__ or ""))
        blocks.append(_activities_table(activities))
    blocks.append("### Of a generator, at its `/metrics` alone")
    blocks.append(_metrics_table(entries(GeneratorMetrics)))
    blocks.append("### Counters at `/metrics`")
    blocks.append("All other figures are gauges.")
    blocks.append(_counters_table())
    blocks.append("### Alarms")
    blocks.append(_alarms_table(RULES))
    return "\n\n".join(blocks)


def page(text: str) -> str:
    """`text`, the content of README.md, with the generated part between the marker lines brought up to date.

    Raises ValueError when the marker lines are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} lacks its marker lines; put back {BEGIN!r} and, below it, {END!r}")
    return f"{before}{BEGIN}\n\n{glossary()}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, or writes them into README.md; exit code 2 for other arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--write"]:
        README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if arguments:
        print(USAGE, file=sys.stderr)
        return 2
    print(glossary())
    return 0


def _alarm_on(name: str, kind: type) -> tuple[str, ...]:
    watched = kind is StepMetrics and any(rule.figure == name for rule in RULES)
    return ("alarm",) if watched else ()


def _paragraphs(docstring: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in docstring.split("\n\n")]


def _metrics_table(metrics: Iterator[GlossaryEntry]) -> str:
    rows = [[f"`{entry.name}`", entry.unit, entry.sentence, ", ".join(entry.shown)] for entry in metrics]
    return _table(["metric", "unit", "what it is", "shown in"], rows)


def _activities_table(activities: type[Activity]) -> str:
    return _table(["activity", "what it is"], [[f"`{activity}`", activity.sentence] for activity in activities])


def _counters_table() -> str:
    kinds: tuple[type[Record], ...] = (StepMetrics, SyncMetrics, EvalMetrics, GeneratorMetrics)
    found = ((family, name, kind) for kind in kinds for name, (family, _) in families_of(kind).items())
    rows = [
        [f"`{family.name}`", f"`{name}` of {kind.kind}", ", ".join(f"`{label}`" for label in family.labels)]
        for family, name, kind in found
        if family.kind == "counter"
    ]
    return _table(["counter", "adds up", "labels"], rows)


def _alarms_table(rules: Sequence[AlarmRule]) -> str:
    rows = [
        [
            f"`{rule.figure}`",
            f"{'<' if rule.side == 'below' else '>'} {_limit(rule, rule.limit)}",
            f"{rule.steps} steps",
            f"{'>=' if rule.side == 'below' else '<='} {_limit(rule, rule.clears_at)}",
            rule.why,
            rule.remedy,
        ]
        for rule in rules
    ]
    return _table(["alarm", "goes on", "after", "goes off", "why this limit", "what helps"], rows)


def _limit(rule: AlarmRule, value: float) -> str:
    return f"{value:g} of `weights.canary_tolerance`" if rule.of_canary_tolerance else f"{value:g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

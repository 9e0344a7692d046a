"""`asyncrl compare RUN RUN ...`: several runs on one page and in one table, and the settings in which they differ."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import UserError
from asyncrl.host.printing import printable
from asyncrl.metrics.sinks import clock_time
from asyncrl.report.page.chart import COLORS
from asyncrl.report.page.curves import Source, sections
from asyncrl.report.page.document import PageContent, axes_of, data_block, section_of
from asyncrl.report.page.drawing import figure_of, key_of
from asyncrl.report.page.markup import Html, joined, markup, shown
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import RunSummary, summarize

log = logging.getLogger(__name__)

MAX_RUNS = len(COLORS)
SETTINGS_FILE = "settings.json"  # the desk writes it: all that decides a run
OWN_SETTINGS = ("run.name", "run.dir")  # of which each run has its own
MAX_TEXT = 60  # characters of one setting

Cell = Callable[[RunSummary], str]

ROWS: Mapping[str, Cell] = {
    "steps": lambda run: f"{run.outcome.steps:,}",
    "wall time": lambda run: clock_time(run.wall_s),
    "reward, first steps": lambda run: shown(run.outcome.reward_first),
    "reward, last steps": lambda run: shown(run.outcome.reward_last),
    "evaluation, first": lambda run: shown(run.outcome.eval_first),
    "evaluation, last": lambda run: shown(run.outcome.eval_last),
    "tokens/s generated": lambda run: shown(run.flow.tokens_generated_per_s, ",.0f"),
    "tokens/s trained": lambda run: shown(run.flow.tokens_trained_per_s, ",.0f"),
    "idle generators": lambda run: shown(run.idle.generator_idle_share, ".0%"),
    "idle learner": lambda run: shown(run.idle.learner_idle_share, ".0%"),
    "policy age, mean": lambda run: shown(run.flow.policy_age_mean),
    "policy age, largest": lambda run: shown(run.flow.policy_age_max, "d"),
    "ESS, median": lambda run: shown(run.health.ess_share_median, ".1%"),
    "ESS, least": lambda run: shown(run.health.ess_share_min, ".1%"),
    "drift, nats": lambda run: shown(run.health.gap_drift_median, ".1e"),
    "engine mismatch, nats": lambda run: shown(run.health.gap_engine_median, ".1e"),
    "weight sync, ms": lambda run: shown(run.syncs.sync_total_ms_median, ",.0f"),
    "generation paused, ms": lambda run: shown(run.syncs.sync_pause_ms_median),
    "syncs failed": lambda run: f"{run.syncs.sync_failed:,}",
    "rollouts failed": lambda run: f"{run.flow.num_failed:,}",
    "rollouts over age": lambda run: f"{run.flow.rollouts_dropped:,}",
    "alarms, in steps": lambda run: ", ".join(f"{name} {n}" for name, n in run.health.alarms.items()) or "none",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs beside each other. `rows` and `settings`: what a row is of → a text for each run."""

    names: Sequence[str]
    runs: Sequence[RunRecords]
    rows: Mapping[str, Sequence[str]]
    settings: Mapping[str, Sequence[str]]


def compare(run_dirs: Sequence[str | Path]) -> Comparison:
    """Reads the runs.

    Raises UserError when there are too few or too many, or one is no run.
    """
    if not 2 <= len(run_dirs) <= MAX_RUNS:
        raise UserError(f"give 2 to {MAX_RUNS} runs, not {len(run_dirs)}: more cannot be told apart by their colors")
    runs = [RunRecords(run_dir) for run_dir in run_dirs]
    summaries = [summarize(run) for run in runs]
    rows = {name: [cell(summary) for summary in summaries] for name, cell in ROWS.items()}
    return Comparison(names_of(runs), runs, rows, differing([settings_of(run.run_dir) for run in runs]))


def names_of(runs: Sequence[RunRecords]) -> list[str]:
    """The folders of the runs by name; with the folder above where two have one name."""
    paths = [run.run_dir.resolve() for run in runs]
    count = Counter(path.name for path in paths)
    return [path.name if count[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths]


def settings_of(run_dir: Path) -> dict[str, str]:
    """All that decides a run, as its folder says; nothing where it does not say it."""
    try:
        said = json.loads((run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in said["settings"]}
    except FileNotFoundError:  # of an older release
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read (%s): settings of this run are not compared", run_dir / SETTINGS_FILE, error)
        return {}


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The settings in which runs differ, of each the values; a dash where a run does not have it."""
    names = dict.fromkeys(name for run in settings for name in run if name not in OWN_SETTINGS)
    values = {name: [_cut(run.get(name, "–")) for run in settings] for name in names}
    return {name: texts for name, texts in values.items() if len({run.get(name) for run in settings}) > 1}


def table(compared: Comparison) -> str:
    """The table for a terminal, and the settings below it."""
    blocks = [_aligned(["", *compared.names], compared.rows)]
    if compared.settings:
        blocks.append(_aligned(["settings that differ", *compared.names], compared.settings))
    return "\n\n".join(blocks)


def comparison_page(compared: Comparison) -> PageContent:
    """The page of a comparison."""
    sources = [Source.of(run, name) for run, name in zip(compared.runs, compared.names, strict=True)]
    axes = axes_of(sources, compared.runs)
    found = sections(sources)
    parts = [
        markup("<h1>{}</h1>", f"{len(compared.names)} runs"),
        _section_of_rows("figures", "Figures", compared.names, compared.rows),
    ]
    if compared.settings:
        parts.append(_section_of_rows("settings", "Settings that differ", compared.names, compared.settings))
    parts += [
        section_of(section.key, section.title, [figure_of(chart, axes) for chart in section.charts])
        for section in found
    ]
    parts.append(data_block(found, axes))
    return PageContent(" · ".join(compared.names), joined(parts))


def _section_of_rows(key: str, title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Html:
    head = joined(
        markup('<th scope="col">{} {}</th>', key_of(color, "line"), name)
        for name, color in zip(names, COLORS, strict=False)
    )
    body = joined(
        markup('<tr><th scope="row">{}</th>{}</tr>', name, joined(markup("<td>{}</td>", text) for text in texts))
        for name, texts in rows.items()
    )
    return markup(
        '<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2>'
        '<div class="wide-table" role="group" aria-label="Table of {1}" tabindex="0"><table>'
        "<thead><tr><td></td>{2}</tr></thead><tbody>{3}</tbody></table></div></section>\n",
        key,
        title,
        head,
        body,
    )


def _aligned(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Rows with the columns below each other; the first column to the left, all others to the right."""
    lines = [[printable(text) for text in line] for line in (head, *([name, *texts] for name, texts in rows.items()))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"

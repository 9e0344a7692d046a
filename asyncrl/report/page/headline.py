"""What a page begins and ends with: alarms with their advice, the figures of the whole run, and what was lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from asyncrl.metrics.alarms import RULES, explain
from asyncrl.report.page.charts import CHART_OF_ALARM
from asyncrl.report.page.markup import Html, joined, markup, shown
from asyncrl.report.run_records import RunRecords, StepRecord, mean
from asyncrl.report.summary import Outcome, RunSummary

NEWEST_STEPS = 10  # what is told beside the figures of the whole run
TELLING = 0.1  # by so much the idle shares of two sides differ where one of them is the bottleneck


# -- alarms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Episode:
    """What an alarm did in a run: in how many steps and how often it was on, the last time from `first` to `last`."""

    name: str
    steps: int
    times: int
    first: int
    last: StepRecord
    is_on: bool


def alarm_notes(run: RunRecords) -> Html:
    """A note for each alarm that was on, those that are still on first; nothing where none was."""
    steps = run.steps_in_force
    episodes = [_episode(name, steps) for name in dict.fromkeys(name for step in steps for name in step.alarms)]
    if not episodes:
        return Html()
    episodes.sort(key=lambda episode: (not episode.is_on, -episode.steps))
    on = sum(episode.is_on for episode in episodes)
    title = f"{_counted(on, 'alarm')} still on" if on else f"{_counted(len(episodes), 'alarm')} went on and off"
    if on and len(episodes) > on:
        title += f", {len(episodes) - on} before"
    return markup(
        '<section id="alarms" aria-labelledby="alarms-title"><h2 id="alarms-title">{}</h2><div class="notes">{}</div>'
        "</section>\n",
        title,
        joined(_note(episode, steps) for episode in episodes),
    )


def _episode(name: str, steps: Sequence[StepRecord]) -> Episode:
    runs = [list(run) for is_on, run in groupby(steps, lambda step: name in step.alarms) if is_on]
    newest = runs[-1]
    return Episode(
        name,
        steps=sum(map(len, runs)),
        times=len(runs),
        first=newest[0].version,
        last=newest[-1],
        is_on=newest[-1] is steps[-1],
    )


def _note(episode: Episode, steps: Sequence[StepRecord]) -> Html:
    rule = next((rule for rule in RULES if rule.figure == episode.name), None)
    when = (
        f"since step {episode.first}"
        if episode.is_on
        else f"the last time in steps {episode.first} to {episode.last.version}"
    )
    said = f"{'still on' if episode.is_on else 'over'}: {when}; on in {_counted(episode.steps, 'step')}"
    if episode.times > 1:
        said += f", {episode.times} times"
    name = markup("{}", episode.name)
    if rule is None:  # of another version of the program
        return markup('<article class="note"><h3>{}</h3><p>{}</p></article>', name, said)
    figures = [figure for step in steps if (figure := getattr(step, rule.figure)) is not None]
    if figures:
        worst = min(figures) if rule.side == "below" else max(figures)
        said += f"; {'least' if rule.side == 'below' else 'largest'} {worst:.3g}, last {figures[-1]:.3g}"
    if (chart := CHART_OF_ALARM.get(episode.name)) is not None:
        name = markup('<a href="#{}">{}</a>', chart, episode.name)
    beyond = f"{rule.side} {rule.limit:g}{' of weights.canary_tolerance' if rule.of_canary_tolerance else ''}"
    cause, remedy = explain(rule, episode.last)
    return markup(
        '<article class="note {}"><h3>{} {}</h3><p>{}</p><p><strong>Likely cause:</strong> {}</p>'
        '<p><strong>What helps:</strong> {}</p><p class="why">{}</p></article>',
        "on" if episode.is_on else "off",
        name,
        beyond,
        said,
        cause,
        remedy,
        rule.why,
    )


def change_notes(summary: RunSummary) -> Html:
    """What to change in the run, a note for each change; nothing where that was not thought over."""
    if not (lines := summary.advice.lines()):
        return Html()
    return markup(
        '<section id="changes" aria-labelledby="changes-title"><h2 id="changes-title">What to change</h2>'
        '<div class="notes">{}</div></section>\n',
        joined(markup('<div class="note"><p>{}</p></div>', line) for line in lines),
    )


# -- the whole run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of the whole run, with what explains it, and the chart that shows it over time."""

    title: str
    text: str
    more: str
    chart: str = ""


def tiles(run: RunRecords, summary: RunSummary) -> Html:
    """The figures of the whole run."""
    entries = [
        markup(
            '<div class="tile"><dt>{}</dt><dd>{}</dd><dd class="more">{}</dd></div>',
            markup('<a href="#{}">{}</a>', tile.chart, tile.title) if tile.chart else tile.title,
            tile.text,
            tile.more,
        )
        for tile in (*_learned(run, summary), *_ran(run, summary))
    ]
    return markup(
        '<section id="figures" aria-labelledby="figures-title"><h2 id="figures-title" class="hidden">Figures</h2>'
        '<dl class="tiles">{}</dl></section>\n',
        joined(entries),
    )


def _learned(run: RunRecords, summary: RunSummary) -> Iterable[Tile]:
    outcome, health = summary.outcome, summary.health
    steps = outcome.reward_window_steps
    yield Tile(
        "Reward",
        f"{shown(outcome.reward_first)} → {shown(outcome.reward_last)}",
        "of the first and the last step" if steps == 1 else f"means of the first and the last {steps} steps",
        "reward" if run.steps else "",
    )
    yield Tile(
        "Evaluation",
        f"{shown(outcome.eval_first)} → {shown(outcome.eval_last)}",
        f"{_counted(len(run.evals), 'evaluation')} of held-out prompts{_at_k(outcome)}",
        "reward" if run.evals else "",
    )
    if outcome.eval_samples is not None and outcome.eval_samples > 1:
        parts = list(outcome.eval_parts_best_last)
        name = parts[0] if parts else ""
        first = outcome.eval_parts_best_first.get(name) if parts else outcome.eval_best_first
        last = outcome.eval_parts_best_last[name] if parts else outcome.eval_best_last
        yield Tile(
            f"pass@{outcome.eval_samples} of {name}" if parts else f"Best of {outcome.eval_samples}",
            f"{shown(first)} → {shown(last)}",
            "mean over held-out prompts of the best completion of each",
            ("eval_parts" if len(parts) > 1 else "reward") if run.evals else "",
        )
    yield Tile(
        "Policy age",
        f"{shown(summary.flow.policy_age_mean)} steps",
        f"mean over tokens; the largest is {shown(summary.flow.policy_age_max, 'd')}",
        "age" if run.steps else "",
    )
    yield Tile(
        "Effective sample",
        shown(health.ess_share_median, ".1%"),
        f"median; the least is {shown(health.ess_share_min, '.1%')}",
        "ess" if health.ess_share_median is not None else "",
    )


def _at_k(outcome: Outcome) -> str:
    return f": avg@{outcome.eval_samples}" if outcome.eval_samples is not None and outcome.eval_samples > 1 else ""


def _ran(run: RunRecords, summary: RunSummary) -> Iterable[Tile]:
    flow, idle = summary.flow, summary.idle
    syncs = summary.syncs
    newest = run.steps_in_force[-NEWEST_STEPS:]
    generated = mean(step.tokens_generated_per_s for step in newest)
    trained = mean(step.tokens_trained_per_s for step in newest)
    yield Tile(
        "Tokens per second",
        f"{shown(flow.tokens_generated_per_s, ',.0f')} · {shown(flow.tokens_trained_per_s, ',.0f')}",
        f"generated and trained; in the last steps {shown(generated, ',.0f')} and {shown(trained, ',.0f')}",
        "throughput" if run.steps else "",
    )
    yield Tile(
        "Idle",
        f"{shown(idle.generator_idle_share, '.0%')} · {shown(idle.learner_idle_share, '.0%')}",
        f"generators and learner; {_bounded(summary)}",
        "idle" if run.steps else "",
    )
    yield Tile(
        "Weight sync",
        f"{shown(syncs.sync_total_ms_median, ',.0f')} ms",
        f"median of {_counted(syncs.sync_count, 'round')}, {syncs.sync_failed} failed; generation paused "
        f"{shown(syncs.sync_pause_ms_median)} ms",
        "rounds" if run.syncs else "",
    )
    if flow.grant_age_mean is not None:
        yield Tile(
            "Length, granted · trained",
            f"{shown(flow.granted_tokens_mean)} · {shown(flow.granted_tokens_mean_trained)}",
            f"tokens; trained {shown(flow.grant_age_mean)} steps after the grant, weighted by length "
            f"{shown(flow.grant_age_token_mean)}",
            "granted",
        )
    yield Tile(
        "Lost rollouts",
        f"{flow.num_failed + flow.rollouts_dropped:,}",
        f"of {flow.num_failed + flow.rollouts_acked:,}: {flow.num_failed:,} failed, {flow.rollouts_dropped:,} over age",
        "losses",
    )


def _bounded(summary: RunSummary) -> str:
    """What bounds the run; by the idle shares alone where its time was not told by activity."""
    if summary.time.bounded_by is not None:
        return f"bounded by {summary.time.bounded_by}: {summary.time.bounded_because}"
    learner, generators = summary.idle.learner_idle_share, summary.idle.generator_idle_share
    if learner is None or generators is None:
        return "not measured"
    if learner > generators + TELLING:
        return "generation is the bottleneck"
    if generators > learner + TELLING:
        return "training is the bottleneck"
    return "neither waits much more than the other"


# -- losses ----------------------------------------------------------------------------------------------------


def losses(run: RunRecords, summary: RunSummary) -> Html:
    """A table of what went wrong, was thrown away or could not be read."""
    rows = [
        markup("<tr><td>{}</td><td>{}</td></tr>", f"{count:,}", said) for count, said in _lost(run, summary) if count
    ]
    table = markup(
        '<div class="scroll" role="group" aria-label="Table of losses" tabindex="0"><table class="losses"><thead><tr>'
        '<th scope="col">how many</th><th scope="col">of what</th>'
        "</tr></thead><tbody>{}</tbody></table></div>",
        joined(rows),
    )
    return markup(
        '<section id="losses" aria-labelledby="losses-title"><h2 id="losses-title">Losses and faults</h2>{}'
        "</section>\n",
        table if rows else markup("<p>{}</p>", "Nothing was lost, nothing failed."),
    )


def _lost(run: RunRecords, summary: RunSummary) -> Iterable[tuple[int, str]]:
    flow, syncs = summary.flow, summary.syncs
    for reason, count in sorted(flow.rollouts_failed.items(), key=lambda item: -item[1]):
        is_loss = reason != "returned"
        yield count, f"rollouts of leases that {'failed' if is_loss else 'a stopping generator gave back'}: {reason}"
    yield flow.rollouts_dropped, f"rollouts over age; by length, shortest tenth first: {_deciles(summary)}"
    yield flow.groups_filtered, "groups with equal rewards that dynamic sampling left out"
    yield sum(line.prompts_left_out or 0 for line in run.step_lines), "examples that no prompt could be made of"
    yield syncs.sync_failed, "rounds of weight sync that nobody committed"
    yield syncs.sync_retries, "failed rounds in a row before others, added up"
    for step in run.returns():
        yield 1, f"restart that trained again from version {step.version - 1}"
    for name, count in run.non_finite.most_common():
        yield count, f"lines in which {name} was NaN or infinite"
    yield run.unreadable_lines, "lines of metrics.jsonl that cannot be read"


def _deciles(summary: RunSummary) -> str:
    return ", ".join(f"{count:,}" for count in summary.flow.dropped_by_length_decile) or "not measured"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

"""Half an hour in which generators come, go, hang and die at random while one learner trains. Does anybody notice?

    python -m benchmarks.faults.churn [--quick]

Three generators of the quickstart task (0.8 million parameters, real daemons, real engines) start; from then on, every
5 to 15 s, one of them is started (join), told to leave (SIGTERM), killed (SIGKILL), or stopped for 1 to 20 s (SIGSTOP,
SIGCONT), at whatever moment of its life that finds it. Empty places are filled sooner than further ones are emptied,
because an engine needs longer to start than the time between two events. Then undisturbed runs of the same number of
steps follow. The bars:

hangs               0 stretches without a new policy version longer than weights.timeout_s + 2 s + the longest step of
                    one undisturbed generator, alone or while the engine of a second one starts beside it and takes half
                    of the CPU, while at least one generator holds a proven version
learner restarts    0: one desk, one trainer, from the first step to the last
throughput          at least 0.9 of what the alive generators allow, see below
reward              no further from the undisturbed curves than these are from each other (from one: than its windows
                    are from the line between their neighbours): root mean square over the windows at most 2, mean of
                    the last quarter at most 3 standard deviations of their difference
journal             every step is +1 and has all its groups; no prompt twice, none skipped; every trained token of a
                    version that the learner had committed for its generator, by its own log, before the step

What alive generators allow. On two CPUs tokens/s does not grow with the number of generators, and every engine that
starts takes a CPU away for many seconds; neither is the doing of weight sync or leases. So time is counted that
generators were offered: wall-clock seconds in which one held a proven version, less those in which its engine was ready
to run but another process had the CPU (the kernel's own count, /proc/PID/schedstat). Time in which a ready engine
waits for leases, for a weight sync or for another generator is offered time: it counts against us. What an offered
second is worth is measured in the undisturbed run: with one generator alone, with one and with two while another one
starts, and with all three. Useful tokens are those acknowledged to a generator and not
dropped; what dies with a killed generator is work that was offered and not delivered.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asyncrl.config.loading import load_config
from benchmarks import common
from benchmarks.faults.churn_account import (
    Offer,
    Rates,
    check_journal,
    compare_rewards,
    gaps,
    ready_spans,
    tokens_between,
)
from benchmarks.faults.churn_observer import Trace
from benchmarks.faults.churn_run import PHASES, Disturber, Interrupt, calm_run, disturbed_run
from benchmarks.studies import shared
from benchmarks.studies.async_vs_sync import ROOT, make_base_model

GRACE_S = 2.0  # beyond weights.timeout_s, as in the fault matrix
LEAST_THROUGHPUT = 0.9
EVERY_S = (5.0, 15.0)
STOP_S = (1.0, 20.0)
SETTINGS = (
    "run.name=churn",
    "run.steps=1000000",
    "learner.lr=5e-5",  # slow enough that the reward still rises after minutes
    "staleness.max_age=4",
    # One engine alone must not feed the learner easily, or the generators would wait for it and not for us.
    "generator.max_sequences=8",
    "generator.kv_cache_gib=0.03",
    "generator.compile=never",
    "generator.cpus=[]",
    "learner.cpus=[]",
    "weights.timeout_s=5",
    "eval.prompts=0",
    "eval.every=0",
    "checkpoint.every=0",
    "log.level=debug",  # the learner names its commits, generators the versions they have proven
)


def main() -> int:
    options = _options()
    make_base_model(options.model)
    interrupt = Interrupt()
    settings = [*SETTINGS, f"model.path={options.model}", *options.overrides]
    config = load_config(options.config, [*settings, "run.dir=unused"])
    record: dict[str, Any] = {"settings": settings}
    with tempfile.TemporaryDirectory(prefix="churn-", dir=options.keep) as name:
        folder = Path(options.keep or name)
        disturber = Disturber(options.seed, tuple(options.every), tuple(options.stop))
        seed = f"run.seed={options.seed}"
        churn = disturbed_run(
            folder / "churn",
            options.config,
            [*settings, seed],
            interrupt,
            disturber=disturber,
            seconds=60 * options.minutes,
        )
        calm: list[Trace] = []
        record |= evaluate(config, churn, calm, folder / "churn")
        _write(options, record, interrupt)  # whatever happens to the rest
        for number in range(options.calm_runs):
            if interrupt.received or churn.error:
                break
            print(f"undisturbed run {number + 1} of {options.calm_runs}: {len(churn.steps)} steps", flush=True)
            trace = calm_run(
                folder / f"calm{number}",
                options.config,
                [*settings, f"run.seed={options.seed + number}"],
                interrupt,
                num_steps=len(churn.steps),
                phase_s=options.phase if number == 0 else 0.0,
                limit_s=120 * options.minutes + 300,
            )
            if not interrupt.received:
                calm.append(trace)
            record |= evaluate(config, churn, calm, folder / "churn")
    path = _write(options, record, interrupt)
    print(table(record))
    for note in notes(options, record, interrupt):
        print(note)
    print(f"written to {path}")
    if churn.steps:
        from benchmarks.faults.churn_picture import draw

        print(f"picture in {draw(record, path.with_suffix('.png'))}")
    return 0 if all(bar["passed"] for bar in record["bars"].values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two minutes and one short undisturbed run: does it run")
    parser.add_argument("--minutes", type=float, help="of disturbance (default 30; 2 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when, and run.seed (default %(default)s)")
    parser.add_argument("--calm-runs", type=int, help="undisturbed runs, each with its own seed (default 2; --quick 1)")
    parser.add_argument("--phase", type=float, help="seconds of each calibration phase (default 60; 15 with --quick)")
    for name, default, what in (("every", EVERY_S, "between events"), ("stop", STOP_S, "length of a stop")):
        text = f"seconds {what}, drawn between these two (default %(default)s)"
        parser.add_argument(f"--{name}", type=float, nargs=2, default=default, metavar="S", help=text)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "models" / "arithmetic", help="made if missing")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of JSON and picture (%(default)s)")
    parser.add_argument("--keep", type=Path, help="new folder for logs and journals, kept (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further configuration keys, for all runs")
    options = parser.parse_args()
    short = options.quick
    for name, full, quick in (("minutes", 30.0, 2.0), ("calm_runs", 2, 1), ("phase", 60.0, 15.0)):
        if getattr(options, name) is None:
            setattr(options, name, quick if short else full)
    if options.minutes <= 0 or options.calm_runs < 0 or not 0 < options.every[0] <= options.every[1]:
        parser.error("--minutes and --every must be above 0, --calm-runs 0 or more")
    options.model = options.model.resolve()
    if options.keep is not None:
        if options.keep.exists() and any(options.keep.iterdir()):
            parser.error(f"--keep {options.keep}: is not empty")
        options.keep.mkdir(parents=True, exist_ok=True)
        options.keep = options.keep.resolve()
    return options


# -- what came out -----------------------------------------------------------------------------------------------------


def evaluate(config: Any, churn: Trace, calm: list[Trace], folder: Path) -> dict[str, Any]:
    """The figures and the bars; a bar that cannot be measured (yet) has not passed."""
    start, end = churn.phases.get("churn", (0.0, 0.0))
    steps = [step for step in churn.steps if start <= step["t"] <= end]
    syncs = [sync for sync in churn.syncs if sync["generators_committed"] and start <= sync["t"] <= end]
    spans = ready_spans(churn.changes, start, end)
    hold_ups = gaps(spans, [step["t"] for step in steps])
    commit_gaps = gaps(spans, [sync["t"] for sync in syncs])
    throughput = _throughput(churn, calm[0]) if calm else {}
    reward = compare_rewards(*_curves(churn, calm))
    journal = check_journal(
        folder / "journal",
        groups_per_step=config.learner.groups_per_step,
        max_age=config.staleness.max_age,
        commits=churn.commits,
    )
    restarts = (churn.learner_starts - 1) + (churn.trainer_starts - 1) if churn.learner_starts else None
    record = {
        "seconds": round(end - start, 1),
        "versions": len(steps),
        "events_by_kind": {kind: sum(event[1] == kind for event in churn.events) for kind in sorted(_kinds(churn))},
        "ready_seconds": _seconds_by_ready(churn),
        "starts_s": _spread(churn.starts_s),
        "wait_for_version_s": _spread(churn.waits_s),
        "step_interval_s": _spread([step["interval_s"] for step in steps]),
        "longest_gap_s": round(hold_ups[0][1], 2) if hold_ups else None,
        "longest_gaps": [[round(at - start, 1), round(seconds, 2)] for at, seconds in hold_ups[:10]],
        "longest_commit_gap_s": round(commit_gaps[0][1], 2) if commit_gaps else None,
        "sync_rounds": len([sync for sync in churn.syncs if start <= sync["t"] <= end]),
        "syncs_failed": sum(sync["generators_failed"] for sync in churn.syncs),
        "rollouts_failed": _summed(step["rollouts_failed"] for step in steps),
        "rollouts_dropped": sum(step["rollouts_dropped"] for step in steps),
        "canary_max_abs_diff": max((sync["canary_max_abs_diff"] for sync in syncs), default=None),
        "generators_ended_on_their_own": churn.own_ends,
        "errors": [trace.error for trace in [churn, *calm] if trace.error],
        "learner_exit_code": churn.learner_exit,
        "others_cpu_share": _others([churn, *calm]),
        "throughput": throughput,
        "reward": reward,
        "journal": asdict(journal),
        "timeline": _timeline(churn, calm),
    }
    limit_s = _hang_limit(config, calm)
    hangs = [gap for gap in hold_ups if limit_s is not None and gap[1] > limit_s]
    record["hang_limit_s"] = limit_s and round(limit_s, 2)
    record["bars"] = {
        "hangs": _bar(len(hangs) if limit_s else None, "0", lambda value: value == 0 and not churn.error),
        "learner restarts": _bar(restarts, "0", lambda value: value == 0 and churn.learner_exit == 0),
        "throughput": _bar(throughput.get("ratio"), f">= {LEAST_THROUGHPUT}", lambda value: value >= LEAST_THROUGHPUT),
        "reward": _bar(reward and round(reward["rms"], 2), "<= 2 std", lambda _: reward["passed"]),
        "journal": _bar(len(journal.faults), "0 faults", lambda value: value == 0 and journal.num_steps > 0),
    }
    return record


def _bar(value: Any, bar: str, passes: Any) -> dict[str, Any]:
    return {"value": value, "bar": bar, "passed": value is not None and bool(passes(value))}


def _kinds(churn: Trace) -> set[str]:
    return {event[1] for event in churn.events}


def _throughput(churn: Trace, calm: Trace) -> dict[str, Any]:
    """Tokens per offered second, undisturbed and disturbed."""
    if not set(PHASES) <= set(calm.phases) or "churn" not in churn.phases:
        return {}
    phases = {}
    for name, (start, end) in calm.phases.items():
        phases[name] = _rate(calm.offers[name], tokens_between(calm.steps, start, end))
    rates = Rates(*(phases[name]["tokens_per_offered_s"] for name in PHASES))
    offer, tokens = churn.offers["churn"], tokens_between(churn.steps, *churn.phases["churn"])
    allowed = rates.allowed_tokens(offer)
    phases["churn"] = _rate(offer, tokens)
    return {
        "ratio": round(tokens / allowed, 4) if allowed else None,
        "tokens": round(tokens),
        "allowed_tokens": round(allowed),
        "tokens_per_engine_cpu_s_ratio": _cpu_ratio(phases),
        "phases": phases,
    }


def _cpu_ratio(phases: dict[str, dict[str, float]]) -> float:
    """A second opinion that sees work, not waiting: tokens per CPU second against one generator beside a start."""
    mine, reference = (phases[name]["tokens_per_engine_cpu_s"] for name in ("churn", PHASES[1]))
    return round(mine / max(reference, 1e-9), 4)


def _rate(offer: Offer, tokens: float) -> dict[str, float]:
    wall_s, offered_s = sum(offer.wall_s.values()), sum(offer.offered_s.values())
    return {
        "seconds": round(wall_s, 1),
        "tokens": round(tokens),
        "tokens_per_s": round(tokens / max(wall_s, 1e-9), 1),
        "offered_s": round(offered_s, 1),
        "tokens_per_offered_s": round(tokens / max(offered_s, 1e-9), 1),
        "engine_cpu_s": round(offer.cpu_s, 1),
        "tokens_per_engine_cpu_s": round(tokens / max(offer.cpu_s, 1e-9), 1),
        "kept_waiting_s": round(offer.kept_waiting_s, 1),
    }


def _hang_limit(config: Any, calm: list[Trace]) -> float | None:
    """With one generator, alone or while another one starts: no step should take longer for want of generators."""
    found = []
    for trace in calm[:1]:
        for phase in PHASES[:2]:
            start, end = trace.phases.get(phase, (0.0, 0.0))
            found += [step["interval_s"] for step in trace.steps if start <= step["t"] <= end]
    return config.weights.timeout_s + GRACE_S + max(found) if found else None


def _curves(churn: Trace, calm: list[Trace]) -> tuple[list[float], list[list[float]]]:
    disturbed, *others = ([step["reward_mean"] for step in trace.steps] for trace in [churn, *calm])
    return disturbed, others


def _seconds_by_ready(churn: Trace) -> dict[str, float]:
    if "churn" not in churn.offers:
        return {}
    wall_s = churn.offers["churn"].wall_s
    return {str(n): round(sum(s for (ready, _), s in wall_s.items() if ready == n), 1) for n in range(4)}


def _summed(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for name, value in count.items():
            total[name] = total.get(name, 0) + value
    return total


def _others(traces: list[Trace]) -> float | None:
    """Median over 5 s at a time: the CPU time of a process that was killed cannot be told from others'."""
    shares = [share for trace in traces for share in trace.others]
    return round(statistics.median(shares), 4) if shares else None


def _spread(values: list[float]) -> list[float] | None:
    """[median, smallest, largest]."""
    return [round(value, 2) for value in common.spread(values)] if values else None


def _timeline(churn: Trace, calm: list[Trace]) -> dict[str, Any]:
    """What the picture shows, in seconds since the disturbance began."""
    start, _ = churn.phases.get("churn", (0.0, 0.0))
    return {
        "events": [[round(time - start, 1), *rest] for time, *rest in churn.events],
        "changes": [[round(time - start, 1), *rest] for time, *rest in churn.changes],
        "versions": [[round(step["t"] - start, 1), step["version"]] for step in churn.steps],
        "rewards": [[round(step["reward_mean"], 4) for step in trace.steps] for trace in [churn, *calm]],
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: the bars, and what stands behind them."""
    lines = [
        [name, "-" if bar["value"] is None else str(bar["value"]), bar["bar"], _verdict(bar)]
        for name, bar in record["bars"].items()
    ]
    figures = {
        "disturbed for, s": record["seconds"],
        "policy versions": record["versions"],
        "events": ", ".join(f"{count} {kind}" for kind, count in record["events_by_kind"].items()),
        "seconds with 0, 1, 2, 3 ready": " / ".join(f"{record['ready_seconds'].get(str(n), 0):.0f}" for n in range(4)),
        "start to first proven version, s": _shown(record["starts_s"]),
        "engine up, or back, to proven version, s": _shown(record["wait_for_version_s"]),
        "step interval, s": _shown(record["step_interval_s"]),
        "longest gap without a version, s": f"{record['longest_gap_s']} (limit {record['hang_limit_s']})",
        "longest gap without a commit, s": record["longest_commit_gap_s"],
        "syncs failed, of rounds": f"{record['syncs_failed']} of {record['sync_rounds']}",
        "tokens, of allowed": f"{record['throughput'].get('tokens')} of {record['throughput'].get('allowed_tokens')}",
    }
    rows = [[name, str(value), "", ""] for name, value in figures.items()]
    return "\n" + shared.table(["", "measured", "bar", ""], [*lines, *rows]) + "\n"


def _verdict(bar: dict[str, Any]) -> str:
    return "not measured" if bar["value"] is None else "PASS" if bar["passed"] else "FAIL"


def _shown(spread: list[float] | None) -> str:
    return f"{spread[0]} ({spread[1]} .. {spread[2]})" if spread else "-"


def notes(options: argparse.Namespace, record: dict[str, Any], interrupt: Interrupt) -> list[str]:
    """What keeps the figures from being a result, and what went wrong."""
    found = [f"journal: {fault}" for fault in record["journal"]["faults"][:5]]
    found += [f"ended on its own: {end}" for end in record["generators_ended_on_their_own"]]
    found += record["errors"]
    if interrupt.received:
        found.append(f"{interrupt.received}: what was measured until then")
    if options.quick:
        found.append("--quick: too short for a result")
    if record["others_cpu_share"] and record["others_cpu_share"] > common.MAX_OTHERS_SHARE:
        found.append(f"BUSY MACHINE: others took {record['others_cpu_share']:.0%} of the CPU (median): not a result")
    return found


def _write(options: argparse.Namespace, record: dict[str, Any], interrupt: Interrupt) -> Path:
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "keep"
    }
    head = {"benchmark": "churn", "date": time.strftime("%Y-%m-%d"), "machine": common.machine(), "options": plain}
    timeline = record.pop("timeline")
    content = {**head, "interrupted": interrupt.received, "notes": notes(options, record, interrupt), **record}
    record["timeline"] = timeline
    # One line for each of the long lists: readable, and still in one file.
    body = ",\n".join(f'  "{name}": {json.dumps(values)}' for name, values in timeline.items())
    text = json.dumps(content, indent=1).removesuffix("\n}") + f',\n "timeline": {{\n{body}\n }}\n}}\n'
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"churn{'.quick' if options.quick else ''}.json"
    path.write_text(shared.without_folders(text, options))
    return path


if __name__ == "__main__":
    sys.exit(main())

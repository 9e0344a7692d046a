"""The command `asyncrl simulate`: how fast a run would be, and how old its tokens, for any number of generators."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from asyncrl.cli.common import Parser
from asyncrl.errors import ConfigError, UserError
from asyncrl.metrics.sinks import clock_time
from asyncrl.simulator.model import Service, SharedCores, Sizes
from asyncrl.simulator.outcome import SimulatedOutcome
from asyncrl.simulator.recorded import Fit, fit_run, shared_cores
from asyncrl.simulator.run import SimulatedRun
from asyncrl.simulator.times import Constant, Distribution, LogNormal

PROGRAM = "asyncrl simulate"
EXAMPLE = "asyncrl simulate --generators 1 2 4 8 --ages 0 1 2 4 --decode-s 0.02 --step-s 6 --tokens 600"
MS = 1e-3
STEPS = 200
CONFIG_FILE = "config.yaml"

TITLES = (
    *("generators", "max_age", "tokens/s", "steps/h", "time", "age mean", "age max", "tokens of age 0, 1, ..."),
    *("wasted", "learner idle", "generators idle"),
)
SHOWN_AGES = 6  # of the distribution; older tokens are added up


def simulate(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code. Raises ConfigError for sizes that no run can have."""
    arguments = _parser().parse_args(argv)
    shared = _shared(arguments)
    if arguments.like is not None:
        from asyncrl.config.loading import load_config

        if not (arguments.like / CONFIG_FILE).is_file():
            raise UserError(f"--like {arguments.like}: no run is there, for it has no {CONFIG_FILE}")
        config = load_config(arguments.like / CONFIG_FILE)
        fit = fit_run(arguments.like, config, shared=shared or shared_cores(config), seed=arguments.seed)
        print("\n".join(fit_lines(fit)), file=sys.stderr, flush=True)
        base, shared = fit.sizes, fit.shared
        service = fit.service
    else:
        base, service = _sizes(arguments), _service(arguments)
    results = []
    for generators in arguments.generators or [base.generators]:
        for max_age in arguments.ages:
            sizes = replace(base, generators=generators, max_age=max_age, steps=arguments.steps or base.steps)
            results.append((sizes, SimulatedRun(sizes, service, shared=shared, seed=arguments.seed).run()))
    if arguments.json is not None:
        _write_json(arguments.json, [{**asdict(sizes), **asdict(outcome)} for sizes, outcome in results])
    if arguments.json != "-":
        print("\n".join(table(results)), flush=True)
    return 0


def _write_json(file: str, figures: list[dict[str, Any]]) -> None:
    text = json.dumps(figures, indent=1) + "\n"
    if file == "-":
        print(text, end="", flush=True)
        return
    try:
        Path(file).write_text(text)
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}; give a file in a folder that is there") from None


def fit_lines(fit: Fit) -> list[str]:
    """The run that times were taken from, beside its own simulation."""
    figures, itself = fit.figures, fit.itself
    return [
        (
            f"the run itself  measured {figures.tokens_per_s:,.0f} tokens/s, mean age {figures.age_mean:.2f}, over "
            f"{figures.steps} steps"
        ),
        (
            f"                simulated {itself.tokens_per_s:,.0f} tokens/s ({fit.ratio:.2f} of it), mean age "
            f"{itself.age_mean:.2f}"
        ),
        f"an engine's step {_step_in_words(fit)}",
    ]


def _step_in_words(fit: Fit) -> str:
    service = fit.service
    text = f"{service.decode_s / MS:.3g} ms and {service.decode_sequence_s / MS:.2g} ms for each of its sequences"
    if fit.assumes_fixed_share:
        return (
            f"{text}: half of a full step is ASSUMED to be there with few sequences too, which the run does not tell; "
            "where engines run emptier than in the run (max_age=0, more generators), tokens/s can be off by a factor"
        )
    return f"{text}, {service.new_sequence_s / MS:.2g} ms for the prompt of a new one; as measured"


def table(results: Sequence[tuple[Sizes, SimulatedOutcome]]) -> list[str]:
    """Lines of a table, one for each run."""
    rows = [TITLES, *(_row(sizes, outcome) for sizes, outcome in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TITLES))]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def _row(sizes: Sizes, outcome: SimulatedOutcome) -> tuple[str, ...]:
    return (
        f"{sizes.generators:,}",
        str(sizes.max_age),
        f"{outcome.tokens_per_s:,.0f}",
        f"{outcome.steps_per_s * 3600:,.0f}",
        clock_time(outcome.wall_s),
        f"{outcome.age_mean:.2f}",
        str(outcome.age_max),
        _ages_in_words(outcome.age_shares),
        f"{outcome.wasted_share:.1%}",
        f"{outcome.learner_idle_share:.0%}",
        f"{outcome.generator_idle_share:.0%}",
    )


def _ages_in_words(shares: Sequence[float]) -> str:
    """`41% 52% 7%`, from age 0 on."""
    shown = [*shares[: SHOWN_AGES - 1], sum(shares[SHOWN_AGES - 1 :])] if len(shares) > SHOWN_AGES else shares
    return " ".join(f"{share:.0%}" for share in shown) + ("+" if len(shares) > SHOWN_AGES else "")


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Simulates runs over the learner's own rules for leases and batches, with the times given here: "
        "one run for each number of generators and each bound on the policy age. `time` is until the last of --steps; "
        "wasted are tokens that were sampled and not trained on. Start-up and failures are no part of it.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="RUN",
        help="take sizes, times and lengths from a run that was made; options of "
        "sizes and times below do not count then",
    )
    whole, seconds = _at_least(int, 0), _at_least(float, 0.0)
    some = _at_least(int, 1)
    parser.add_argument(
        "--generators", type=some, nargs="+", metavar="N", help="how many (default 1, or those of the run)"
    )
    parser.add_argument(
        "--ages", type=whole, nargs="+", default=[0, 1, 2, 4], metavar="A", help="staleness.max_age (default 0 1 2 4)"
    )
    parser.add_argument(
        "--steps", type=some, help="optimizer steps of each run (default 200; of a run, as many as it has)"
    )
    parser.add_argument("--max-sequences", type=some, default=64, help="of one generator (default 64)")
    parser.add_argument("--group-size", type=some, default=8, help="sampling.group_size (default 8)")
    parser.add_argument("--groups-per-step", type=some, default=32, help="groups of a batch (default 32)")
    parser.add_argument("--cell-size", type=some, default=8, help="weights.cell_size (default 8)")
    parser.add_argument("--tokens", type=_at_least(float, 1.0), default=512, help="mean completion (default 512)")
    parser.add_argument(
        "--sigma", type=seconds, default=0.0, help="of lognormal lengths; 0: all of the mean length (default 0)"
    )
    parser.add_argument("--max-tokens", type=some, default=None, help="cut lengths there (default 8 times the mean)")
    parser.add_argument("--decode-s", type=seconds, default=0.02, help="one decode step, s (default 0.02)")
    parser.add_argument(
        "--decode-sequence-s", type=seconds, default=0.0, help="what each running sequence adds to it, s (default 0)"
    )
    parser.add_argument("--step-s", type=seconds, default=5.0, help="one optimizer step, s (default 5)")
    parser.add_argument("--step-token-s", type=seconds, default=0.0, help="what each token adds to it, s (default 0)")
    parser.add_argument("--reward-s", type=seconds, default=0.0, help="reward of a group, s (default 0)")
    parser.add_argument("--snapshot-ms", type=seconds, default=0.0, help="training stands still, ms (default 0)")
    parser.add_argument("--stage-ms", type=seconds, default=0.0, help="transfer and check of weights, ms (default 0)")
    parser.add_argument("--pause-ms", type=seconds, default=0.0, help="of a swap, ms (default 0)")
    parser.add_argument("--commit-ms", type=seconds, default=0.0, help="proof of a swap, ms (default 0)")
    parser.add_argument("--grant-ms", type=seconds, default=0.0, help="from room to the next lease, ms (default 0)")
    parser.add_argument(
        "--shared-cores",
        type=some,
        nargs=3,
        metavar=("CORES", "LEARNER_THREADS", "GENERATOR_THREADS"),
        help="learner and generators share so many cores; without it each has its own",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="every figure as JSON: in a file, or instead of the table"
    )
    return parser


def _at_least(number: Callable[[str], float], least: float) -> Callable[[str], float]:
    """An argparse type: a number that is not below `least`."""

    def parse(text: str) -> float:
        value = number(text)
        if not value >= least or value == float("inf"):
            raise ValueError(f"{text} is not a number of {least} or more")
        return value

    parse.__name__ = f"number of {least} or more"
    return parse


def _sizes(given: argparse.Namespace) -> Sizes:
    return Sizes(
        generators=1,
        max_sequences=given.max_sequences,
        group_size=given.group_size,
        groups_per_step=given.groups_per_step,
        max_age=0,
        steps=given.steps or STEPS,
        cell_size=given.cell_size,
    )


def _service(given: argparse.Namespace) -> Service:
    if not given.step_s and not given.step_token_s:
        raise ConfigError("--step-s 0 and --step-token-s 0: a step takes time, give one of the two")
    if not given.decode_s and not given.decode_sequence_s:
        raise ConfigError("--decode-s 0 and --decode-sequence-s 0: a decode step takes time, give one of the two")
    return Service(
        completion_tokens=_lengths(given.tokens, given.sigma, given.max_tokens),
        decode_s=given.decode_s,
        decode_sequence_s=given.decode_sequence_s,
        step_s=Constant(given.step_s),
        step_token_s=given.step_token_s,
        reward_s=Constant(given.reward_s),
        snapshot_s=Constant(given.snapshot_ms * MS),
        stage_s=Constant(given.stage_ms * MS),
        pause_s=Constant(given.pause_ms * MS),
        commit_s=Constant(given.commit_ms * MS),
        grant_s=given.grant_ms * MS,
    )


def _lengths(mean: float, sigma: float, most: int | None) -> Distribution:
    return LogNormal(mean, sigma, most or 8 * mean) if sigma else Constant(mean)


def _shared(given: argparse.Namespace) -> SharedCores | None:
    return SharedCores(*given.shared_cores) if given.shared_cores else None

"""What to change in a run, and what that would bring: the run simulated again with one setting changed.

    advisor = Advisor(folder, config)                 # service times of the run, and the run itself simulated
    advisor.predict(["staleness.max_age=3"])          # tokens/s, as an interval
    advise(folder, deadline=monotonic() + 10)         # the changes worth making, for the end of a run

A prediction is the measured rate times the ratio of two simulations, so that what the simulation gets wrong in both
cancels. What the run does not tell (how much of an engine's step, or of a pass, is there with little in it too) is
taken both ways, and widens the interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asyncrl.config import Config
from asyncrl.config.loading import load_config
from asyncrl.errors import ConfigError, UserError
from asyncrl.report.advisor import WORTH_CHANGING, Advice, AdvisedChange
from asyncrl.simulator.model import Service
from asyncrl.simulator.outcome import SimulatedOutcome
from asyncrl.simulator.recorded import fit_run, read_steps, shared_cores, sizes_of
from asyncrl.simulator.run import SimulatedRun
from asyncrl.simulator.step_costs import StepCosts, step_costs, step_growth

CONFIG_FILE = "config.yaml"
MOST = 3  # changes that are named
# Of a prediction: what a few tries of `benchmarks.speed.advisor` came to, with errors of 7, 23, 25 and 41 %. A second
# generator on shared cores was foretold 76 % too high, and is therefore not advised.
MODEL_ERROR = 0.25
TRUSTED = 0.25  # by so much a run and its own simulation may differ
SIMULATED_ROLLOUTS = 10_000  # in one simulated run
FEWEST_STEPS, MOST_STEPS = 15, 60
WITHIN_S = 10.0
LOOKING_SHARE = 0.6  # of the time until no further change is looked at: the best still need their intervals
SHARES = (0.2, 0.8)  # of a full engine's step that may be there with one sequence, where nobody measured it


@dataclass(frozen=True, slots=True)
class Candidate:
    """One change: keys to set, or more generators. cost: what is paid for it."""

    settings: tuple[str, ...]
    cost: str
    generators: int | None = None

    @property
    def shown(self) -> str:
        """As it is written on the command line."""
        return " ".join(self.settings) if self.generators is None else f"--generators {self.generators}"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Completion tokens trained per second, and the mean age of them."""

    tokens_per_s: float
    low: float
    high: float
    age_mean: float


@dataclass(frozen=True, slots=True)
class _Variant:
    """One of the ways in which what a run does not tell may be, and the run itself under it."""

    service: Service
    costs: StepCosts | None
    itself: SimulatedOutcome


class Advisor:
    """Predicts what a run would do under other settings."""

    def __init__(self, folder: Path, *, seed: int = 0, go_on: Callable[[], bool] = lambda: True) -> None:
        """Takes times from the run in `folder`, and finds by simulating it what it does not tell.

        go_on: see `fit_run`.

        Raises UserError where there is no run, or one too short to be simulated, and ConfigError as `load_config`.
        """
        self._file = folder / CONFIG_FILE
        self.config = load_config(self._file)
        rollouts = self.config.learner.groups_per_step * self.config.sampling.group_size
        self._steps = max(FEWEST_STEPS, min(MOST_STEPS, SIMULATED_ROLLOUTS // rollouts))
        self._seed = seed
        shared = shared_cores(self.config)
        self.fit = fit_run(folder, self.config, shared=shared, seed=seed, steps=self._steps, go_on=go_on)
        self.costs = step_costs(read_steps(folder), self.config)
        self._variants: list[_Variant] = []

    @property
    def measured(self) -> float:
        """Completion tokens that the run trained per second."""
        return self.fit.figures.tokens_per_s

    @property
    def is_trusted(self) -> bool:
        """Whether the simulation of the run itself is near what was measured."""
        return abs(self.fit.ratio - 1) <= TRUSTED

    def glance(self, settings: Sequence[str] = (), *, generators: int | None = None) -> float:
        """The rate under these settings, from one simulation. Raises ConfigError where they are forbidden."""
        costs = None if self.costs is None else self.costs.settled(0.5)
        outcome = self._simulate(load_config(self._file, settings), generators, self.fit.service, costs)
        return self.measured * outcome.tokens_per_s / self.fit.itself.tokens_per_s

    def predict(self, settings: Sequence[str] = (), *, generators: int | None = None) -> Prediction:
        """The rate and its interval under these settings. Raises ConfigError where they are forbidden."""
        config = load_config(self._file, settings)
        self._variants = self._variants or list(self._all_variants())
        outcomes = [self._simulate(config, generators, each.service, each.costs) for each in self._variants]
        rates = [
            self.measured * outcome.tokens_per_s / variant.itself.tokens_per_s
            for outcome, variant in zip(outcomes, self._variants, strict=True)
        ]
        error = max(MODEL_ERROR, abs(self.fit.ratio - 1))
        return Prediction(rates[0], min(rates) * (1 - error), max(rates) * (1 + error), outcomes[0].age_mean)

    def _all_variants(self) -> Iterator[_Variant]:
        """The likeliest first."""
        service, costs = self.fit.service, self.costs
        settled = None if costs is None else costs.settled(0.5)
        yield _Variant(service, settled, self.fit.itself)
        if costs is not None and costs.input_s is None:
            yield from (_Variant(service, costs.settled(share), self.fit.itself) for share in (0.0, 1.0))
        if self.fit.assumes_fixed_share:
            for share in SHARES:
                other = _with_fixed_share(service, share, self.fit.sizes.max_sequences)
                yield _Variant(other, settled, self._simulate(self.config, None, other, settled))

    def _simulate(
        self, config: Config, generators: int | None, service: Service, costs: StepCosts | None
    ) -> SimulatedOutcome:
        before = self.fit.sizes.generators
        sizes = sizes_of(config, generators or before, self._steps)
        shared = self.fit.shared
        if shared is not None and not config.generator.cpus:  # as `asyncrl run` divides the cores
            threads = max(1, shared.generator_threads * before // sizes.generators)
            shared = replace(shared, generator_threads=threads)
        service = replace(service, step_s=service.step_s.times(step_growth(costs, self.config, config)))
        return SimulatedRun(sizes, service, shared=shared, seed=self._seed).run()


def _with_fixed_share(service: Service, share: float, sequences: int) -> Service:
    """The same decode step of a full engine, with this share of it there for a single sequence too."""
    full = service.decode_s + sequences * service.decode_sequence_s
    return replace(service, decode_s=share * full, decode_sequence_s=(1 - share) * full / sequences)


# -- what could be changed -----------------------------------------------------------------------------------


def candidates(config: Config, generators: int) -> Iterator[Candidate]:
    """Changes that are worth a thought, whatever bounds the run; some may be forbidden."""
    learner, age = config.learner, config.staleness.max_age
    engine = config.generator.max_sequences
    more = generators + max(1, generators // 4)
    yield Candidate((), "memory for another engine, and a GPU where engines have one", generators=more)
    yield Candidate(
        (f"generator.max_sequences={2 * engine}",), f"room for {engine:,} more sequences in the KV cache of each engine"
    )
    for older in dict.fromkeys((age + 1, max(2, 2 * age))):
        yield Candidate((f"staleness.max_age={older}",), f"tokens up to {older} steps old: watch ess_share")
    for factor in (2, 4):
        tokens = factor * learner.micro_batch_tokens
        yield Candidate((f"learner.micro_batch_tokens={tokens}",), f"activations of {tokens:,} tokens at a time")
    if every := config.checkpoint.every:
        yield Candidate((f"checkpoint.every={4 * every}",), f"a crash takes back up to {4 * every} steps")
    if config.eval.prompts and (every := config.eval.every):
        yield Candidate((f"eval.every={4 * every}",), "a quarter of the evaluations")
    yield Candidate(
        (f"learner.groups_per_step={2 * learner.groups_per_step}",), "half as many updates from the same tokens"
    )
    yield Candidate(
        (f"sampling.group_size={2 * config.sampling.group_size}",), "half as many prompts for the same tokens"
    )


def advise(
    folder: Path,
    *,
    within_s: float = WITHIN_S,
    go_on: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
) -> Advice:
    """The changes to a run that are worth making, the best first; those that there was time to think of.

    within_s: after so many seconds no further change is simulated. go_on: says no when somebody waits for the end.
    """
    began = clock()

    def is_time_left(share: float = LOOKING_SHARE) -> bool:
        return clock() < began + share * within_s and go_on()

    try:
        advisor = Advisor(folder, go_on=is_time_left)
    except UserError as error:
        return Advice(note=f"nothing is predicted: {error}")
    if not advisor.is_trusted:
        return Advice(
            note=f"nothing is predicted: simulated, the run makes {advisor.fit.itself.tokens_per_s:,.0f} tokens/s, and "
            f"it made {advisor.measured:,.0f}"
        )
    known = list(candidates(advisor.config, advisor.fit.sizes.generators))
    if advisor.fit.shared is not None:
        known = [candidate for candidate in known if candidate.generators is None]
    found: list[tuple[float, Candidate]] = []
    note = ""
    for number, candidate in enumerate(known):
        if not is_time_left():
            note = f"{number} of {len(known)} changes were thought over in {within_s:g} s"
            break
        try:
            rate = advisor.glance(candidate.settings, generators=candidate.generators)
        except ConfigError:  # the configuration forbids it
            continue
        if rate >= (1 + WORTH_CHANGING) * advisor.measured:
            found.append((rate, candidate))
    found.sort(key=lambda entry: -entry[0])
    best = [candidate for _, candidate in found[:MOST]]
    changes = [_change(advisor, candidate) for candidate in best if is_time_left(1.0)]
    if len(changes) < len(best):
        note = f"{len(changes)} of {len(best)} changes that would gain are told: for the others there was no time"
    return Advice(tuple(changes), advisor.measured, note)


def _change(advisor: Advisor, candidate: Candidate) -> AdvisedChange:
    foretold = advisor.predict(candidate.settings, generators=candidate.generators)
    before, after = advisor.fit.itself.age_mean, foretold.age_mean
    ages = f"; mean age {before:.2f} → {after:.2f}" if after > before + 0.1 else ""
    return AdvisedChange(
        candidate.shown,
        tokens_per_s=foretold.tokens_per_s,
        low=foretold.low,
        high=foretold.high,
        gain=foretold.tokens_per_s / advisor.measured - 1,
        cost=candidate.cost + ages,
    )

"""What bounds a run, read from where its time went (`metrics.ledger`); and what is said of changes to it.

    the learner waits for data?   generators wait for leases?   then what bounds the run is
    ---------------------------   ---------------------------   --------------------------------------------------
    no                            no                            both sides alike
    no                            yes                           the learner
    yes                           no                            what generators spend most on: decoding, rewards, ...
    yes                           most of all                   staleness.max_age: each side waits for the other

Start-up is left out of all shares: a longer run has as much of it. A run that was start-up for the most part is not
judged beyond that.

What a change would bring is predicted by simulating the run (`simulator.advice`); here is how it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from asyncrl.metrics.ledger import GeneratorActivity, LearnerActivity, shares

WORTH_CHANGING = 0.05  # a predicted gain below this share of the throughput is none to change a run for
WORTH_NAMING = 0.1  # a wait below this share of a side's time is none that somebody would tune for

# What generators spend their time on → its name as a bound, and what to say of it.
CAUSES: tuple[tuple[tuple[GeneratorActivity, ...], str, str], ...] = (
    ((GeneratorActivity.DECODE,), "generators", "engines sampled for {share} of theirs"),
    ((GeneratorActivity.EVAL,), "evaluation", "engines had nothing but evaluations for {share} of theirs"),
    ((GeneratorActivity.REWARDS,), "rewards", "engines were empty for {share} of theirs with rewards under way"),
    (
        (GeneratorActivity.WEIGHTS, GeneratorActivity.SWAP),
        "weight sync",
        "engines had no proven version or were swapping for {share} of theirs",
    ),
    ((GeneratorActivity.LEASES,), "staleness.max_age", "generators waited for leases for {share} of theirs"),
    ((GeneratorActivity.ROOM,), "the learner's intake", "results could not leave generators for {share} of theirs"),
)


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What bounds a run, and the figures that say so."""

    name: str
    evidence: str


@dataclass(frozen=True, slots=True)
class AdvisedChange:
    """A change to a run, and the completion tokens that it would then train per second, with their interval.

    setting  as it is written on the command line
    gain     share of the throughput that was measured
    cost     what is paid for it, in words
    """

    setting: str
    tokens_per_s: float
    low: float
    high: float
    gain: float
    cost: str

    def in_words(self, measured: float) -> str:
        """`staleness.max_age=3: 2,400 tokens/s (2,160 to 2,640), +18%; costs: ...`."""
        told = f"{self.tokens_per_s:,.0f} tokens/s ({self.low:,.0f} to {self.high:,.0f}), {self.gain:+.0%}"
        if self.low <= measured:
            told += ", but whether it gains at all cannot be told"
        return f"{self.setting}: {told}; costs: {self.cost}"


@dataclass(frozen=True, slots=True)
class Advice:
    """Changes worth making to a run that trained `measured` tokens per second, the best first.

    note: why there are none, or what else is to be known.
    """

    changes: tuple[AdvisedChange, ...] = ()
    measured: float = 0.0
    note: str = ""

    def lines(self) -> list[str]:
        """For people; empty where there is nothing to say."""
        return [*(change.in_words(self.measured) for change in self.changes), *([self.note] if self.note else [])]


Advise = Callable[[Path], Advice]  # of the run in a folder
AdviseWhile = Callable[[Path, Callable[[], bool]], Advice]  # the same, asking before each simulation whether to go on


def bottleneck(learner_s: Mapping[str, float], generator_s: Mapping[str, float]) -> Bottleneck | None:
    """What bounds a run whose time by activity is this; None where a side never came to work."""
    start_share = shares(learner_s).get(LearnerActivity.START, 0.0)
    learner, generators = _at_work(learner_s), _at_work(generator_s)
    if not learner or not generators:
        return None
    if start_share > 0.5:
        return Bottleneck("start-up", f"it took {start_share:.0%} of the learner's time")
    data = learner.get(LearnerActivity.DATA, 0.0)
    no_work = generators.get(GeneratorActivity.LEASES, 0.0) + generators.get(GeneratorActivity.ROOM, 0.0)
    waited = f"the learner waited {data:.0%} of its time for data"
    if data < WORTH_NAMING:
        evidence = f"{waited}, generators {no_work:.0%} of theirs for leases or to hand over results"
        return Bottleneck("both sides alike" if no_work < WORTH_NAMING else "the learner", evidence)
    totals = [sum(generators.get(activity, 0.0) for activity in activities) for activities, _, _ in CAUSES]
    share, (_, name, said) = max(zip(totals, CAUSES, strict=True), key=lambda cause: cause[0])
    return Bottleneck(name, f"{waited}; {said.format(share=f'{share:.0%}')}")


def _at_work(seconds: Mapping[str, float]) -> dict[str, float]:
    """The share of each activity in all time but the start."""
    return shares({activity: spent for activity, spent in seconds.items() if activity != LearnerActivity.START})

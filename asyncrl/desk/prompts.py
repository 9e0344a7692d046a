"""The prompts that leases are about: made by the task's helper process, ahead of need.

The desk asks for the prompts that are leased next, a few at once, and grants no lease before its prompt is there. A
prompt that was let go of (there is room for a number of them) is asked for again when it is needed. An ordinal that no
prompt can be made of is left out: it is settled in the lease book, and the next one takes its slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.lease_records import LeaseRecord
from asyncrl.tasks.pipe import PromptMade
from asyncrl.tasks.prompts import Prompt
from asyncrl.types import LeaseKey, LeaseKind

AHEAD = 256  # ordinals for which prompts are made before they are leased
ASKED_AT_ONCE = 64  # so few that one that is needed now does not wait long behind them
KEPT = 16_384  # prompts of leases that run or wait, and those ahead


class PromptMaker(Protocol):
    """Where prompts come from: `tasks.helper.TaskHelper`."""

    @property
    def fd(self) -> int:
        """Readable when there is something to take; -1 where there never is."""

    @property
    def num_asked(self) -> int:
        """Ordinals that were asked for and are still to come."""

    @property
    def evals(self) -> Sequence[Prompt] | None:
        """The held-out prompts; None until they are there."""

    def ask(self, ordinals: Iterable[int], now: float) -> None:
        """Wants these training prompts."""

    def take(self, now: float) -> list[PromptMade]:
        """What has come. Raises a UserError when the task cannot be used."""

    def next_deadline(self) -> float:
        """When `take` has something to do at the latest."""

    def describe(self) -> str:
        """What is waited for, in words for the log; empty when nothing is."""

    def stop(self) -> None:
        """No more prompts are wanted."""


class TrainPrompts(Protocol):
    """Makes training prompts here and now."""

    def train(self, ordinal: int) -> Prompt:
        """The prompt of a training ordinal; the same one each time."""


class MadeAtOnce:
    """A `PromptMaker` without a process of its own, for desks that run without a task: in measurements and tests."""

    fd, num_asked = -1, 0

    def __init__(self, source: TrainPrompts, evals: Sequence[Prompt] = ()) -> None:
        self.evals = evals
        self._source = source
        self._made: list[PromptMade] = []

    def ask(self, ordinals: Iterable[int], now: float) -> None:
        """See `PromptMaker.ask`."""
        for ordinal in ordinals:
            prompt = self._source.train(ordinal)
            self._made.append(PromptMade(ordinal, ordinal, prompt.token_ids.tobytes(), prompt.payload))

    def take(self, now: float) -> list[PromptMade]:
        """See `PromptMaker.take`."""
        made, self._made = self._made, []
        return made

    def next_deadline(self) -> float:
        """See `PromptMaker.next_deadline`."""
        return float("inf")

    def describe(self) -> str:
        """See `PromptMaker.describe`."""
        return ""

    def stop(self) -> None:
        """See `PromptMaker.stop`."""


class LeasedPrompts:
    """Training prompts by ordinal, held-out ones by their place in the evaluation that the lease book has now."""

    def __init__(self, maker: PromptMaker, leases: LeaseBook) -> None:
        self._maker = maker
        self._leases = leases
        self._prompts: dict[int, Prompt] = {}  # by ordinal; the one that was needed for longest is last
        self._look_through_at = 2 * AHEAD  # so many are kept before those that nobody needs are let go of
        self._asked: set[int] = set()
        self._left_out: list[PromptMade] = []  # since the last `take_left_out`
        self._needless: list[LeaseRecord] = []

    @property
    def fd(self) -> int:
        """Readable when there is something to do for `advance`; -1 where there never is."""
        return self._maker.fd

    @property
    def num_evals(self) -> int | None:
        """Prompts of one evaluation, 0 when nothing is evaluated; None until they are there."""
        return None if self._maker.evals is None else len(self._maker.evals)

    def next_deadline(self) -> float:
        """When `advance` has something to do at the latest, in monotonic seconds."""
        return self._maker.next_deadline()

    def describe(self) -> str:
        """What is waited for, in words for the log; empty when nothing is."""
        return self._maker.describe()

    def stop(self) -> None:
        """The run stops: no more prompts are wanted, and whatever the task does now disturbs nobody."""
        self._maker.stop()

    def advance(self, now: float) -> None:
        """Takes in what was made, and asks for what is leased next.

        Raises TaskError or ModelError when the task cannot be used.
        """
        self._take(now)
        if self._maker.num_asked < ASKED_AT_ONCE:
            wanted = [n for n in self._leases.upcoming(AHEAD) if n not in self._prompts and n not in self._asked]
            self._ask(wanted[:ASKED_AT_ONCE], now)

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._prompts

    def is_there(self, ordinal: int, now: float) -> bool:
        """Whether a training prompt is there. One that is not is asked for."""
        if ordinal not in self._prompts and ordinal not in self._asked:
            self._ask([ordinal], now)
            self._take(now)
        return ordinal in self._prompts

    def of(self, key: LeaseKey) -> Prompt:
        """The prompt of a lease, which must be there. An eval lease must belong to the current evaluation."""
        if key.kind is LeaseKind.TRAIN:
            return self._prompts[key.ordinal]
        assert self._leases.evaluation is not None, "eval leases belong to an evaluation"
        assert self._maker.evals is not None, "no evaluation starts before its prompts are there"
        return self._maker.evals[self._leases.evaluation.prompt_index(key.ordinal)]

    def payloads(self, ordinals: Iterable[int]) -> dict[int, Mapping[str, Any]]:
        """What the task gives the reward of these training prompts, by ordinal: of those that are still kept."""
        return {n: prompt.payload for n in ordinals if (prompt := self._prompts.get(n)) is not None}

    def held_out_payload(self, place: int) -> Mapping[str, Any]:
        """What the task gives the reward of a held-out prompt."""
        assert self._maker.evals is not None, "no evaluation starts before its prompts are there"
        return self._maker.evals[place].payload

    def take_left_out(self) -> list[PromptMade]:
        """Ordinals left out since the last call, for the journal."""
        news, self._left_out = self._left_out, []
        return news

    def take_needless(self) -> list[LeaseRecord]:
        """Running leases of ordinals that were left out meanwhile: their holders should abandon them."""
        needless, self._needless = self._needless, []
        return needless

    def _ask(self, ordinals: list[int], now: float) -> None:
        self._asked.update(ordinals)
        self._maker.ask(ordinals, now)

    def _take(self, now: float) -> None:
        for made in self._maker.take(now):
            self._asked.discard(made.ordinal)
            prompt = made.made()
            if isinstance(prompt, Prompt):
                self._prompts[made.ordinal] = prompt
            elif not self._leases.is_done(made.ordinal):
                self._left_out.append(made)
                if (running := self._leases.settle_without_prompt(made.ordinal, now)) is not None:
                    self._needless.append(running)
        if len(self._prompts) > self._look_through_at:
            # Those of groups that wait for their step stay: their payloads are written with rollouts of it.
            self._prompts = {n: prompt for n, prompt in self._prompts.items() if not self._leases.is_settled(n)}
            self._look_through_at = 2 * len(self._prompts) + AHEAD
        while len(self._prompts) > KEPT:
            del self._prompts[next(iter(self._prompts))]

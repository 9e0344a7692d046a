"""The reward as a weighted sum of named parts: those of the task, and further ones from the configuration.

    reward:
      parts:
        judge:    {kind: judge, url: "http://127.0.0.1:8000/v1", model: NAME, template: "... {completion} ..."}
        helpful:  {kind: reward_model, url: "http://127.0.0.1:8001"}   # vLLM's /classify or /score
        helpful2: {kind: reward_model, path: FOLDER}                   # every generator starts a server of its own
        math:     {kind: math}                                         # against payload["answer"], by math-verify
        overlong: {kind: overlong, max_tokens: 256, margin: 64}        # DAPO's soft punishment
        length:   {kind: length, max_tokens: 256}
        format:   {kind: format, pattern: "<think>.*</think>.*"}
        mine:     {kind: rule, path: "my_module:my_function", args: {}}   # function(completion, payload, **args)
      weights: {exact: 1.0, judge: 0.5, helpful: 0}                    # 1 where none is given; 0 = logged only

    reward of a rollout = sum over all parts of weight x value

Values are logged as they are, under the part's name. A part that has no value (a dead server, a judge whose answer
cannot be read) fails the rollout; it never counts as zero. The classes of KINDS document the arguments.

Standard library only until a part is prepared: the configuration is checked with this at every start.
"""

from __future__ import annotations

import concurrent.futures
import difflib
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from asyncrl.errors import ConfigError, DeadlineExceeded, RewardError
from asyncrl.rewards.base import Part, RemotePart, Sample, arguments_of, wrong_type
from asyncrl.rewards.http_endpoint import HttpEndpoint, LoopThread
from asyncrl.rewards.kinds.judge import Judge
from asyncrl.rewards.kinds.local import Format, Length, Overlong, UserRule
from asyncrl.rewards.kinds.math_answer import MathAnswer
from asyncrl.rewards.kinds.reward_model import RewardModel
from asyncrl.rewards.secret_texts import redacted
from asyncrl.tasks.base import Task, checked_reward
from asyncrl.types import (
    MAX_REWARD_PARTS,
    REWARD_PART_NAME,
    REWARD_PART_NAME_RULE,
    is_part_name,
    reward_parts_problem,
    reward_problem,
    weighted_sum,
)

KINDS: dict[str, type[Part]] = {
    kind.kind: kind for kind in (Judge, RewardModel, MathAnswer, Overlong, Length, Format, UserRule)
}
_GRACE_S = 1.0  # a request's own deadline comes first and says more

Specs = Mapping[str, Any]


# -- configuration ---------------------------------------------------------------------------------------------------


def check_reward_parts(
    parts: Specs,
    weights: Specs,
    *,
    task_parts: Collection[str] | None = None,
    reward_timeout_s: float = math.inf,
) -> list[str]:
    """What is wrong with `reward.parts` and `reward.weights`, a sentence each; nothing outside of them is looked at.

    Args:
        parts: name -> {kind, argument, ...}, as written in the configuration.
        weights: name -> weight.
        task_parts: names of the task's own parts; None when they are not known, so that a weight may be meant for one.
        reward_timeout_s: deadline of one completion, within which every part must end.
    """
    problems = [problem for name, spec in parts.items() for problem in _problems_of(name, spec, reward_timeout_s)]
    problems += _task_part_problems(task_parts or ())
    num_own = _most_at_once(task_parts or ())
    if (count := len(parts) + num_own) > MAX_REWARD_PARTS:
        own = f", and the task has {num_own} of its own" if num_own else ""
        problems.append(f"reward.parts has {len(parts)} parts{own}: {count} of at most {MAX_REWARD_PARTS}")
    problems += [
        f"reward.parts.{name}: the task has a part of this name already; choose another"
        for name in set(parts) & set(task_parts or ())
    ]
    known = None if task_parts is None else [*task_parts, *parts]
    return problems + [problem for name, weight in weights.items() for problem in _weight_problems(name, weight, known)]


def _most_at_once(names: Collection[str]) -> int:
    """How many of a task's parts one reward may have: of a mix, those of one task."""
    return max(Counter(str(name).rpartition("/")[0] for name in names).values(), default=0)


def _task_part_problems(names: Collection[str]) -> list[str]:
    return [
        f"the task's reward part {name!r:.100} must be named by {REWARD_PART_NAME_RULE}: metrics are named after it"
        for name in names
        if not isinstance(name, str) or not is_part_name(name)
    ]


def make_parts(parts: Specs) -> dict[str, Part]:
    """The parts by name. Raises ConfigError as `check_reward_parts` says it."""
    if problems := check_reward_parts(parts, {}):
        raise ConfigError("\n".join(problems))
    return {name: _make(spec) for name, spec in parts.items()}


def prepare_parts(parts: Mapping[str, Part]) -> list[str]:
    """Lets each part import and read what it needs of this machine. Returns what is missing, a sentence each."""
    problems = []
    for name, part in parts.items():
        try:
            part.prepare()
        except ConfigError as error:
            problems.append(f"reward.parts.{name}: {error}")
    return problems


def _make(spec: Specs) -> Part:
    return KINDS[spec["kind"]](**{name: value for name, value in spec.items() if name != "kind"})


def _problems_of(name: Any, spec: Any, reward_timeout_s: float) -> list[str]:
    place = f"reward.parts.{name}"
    if not isinstance(name, str) or not REWARD_PART_NAME.fullmatch(name):
        return [f"{place}: a name has {REWARD_PART_NAME_RULE}: metrics are named after it"]
    if not isinstance(spec, Mapping) or not isinstance(spec.get("kind"), str):
        return [f"{place} must be a mapping with a kind ({', '.join(KINDS)}) and its arguments, not {spec!r:.100}"]
    kind = KINDS.get(spec["kind"])
    if kind is None:
        near = _nearest(spec["kind"], KINDS)
        return [f"{place}: there is no kind {spec['kind']}{near}; kinds are {', '.join(KINDS)}"]
    arguments = arguments_of(kind)
    given = [argument for argument in spec if argument != "kind"]
    problems = [
        f"{place}: {kind.kind} has no argument {argument}{_nearest(str(argument), arguments)}"
        for argument in given
        if argument not in arguments
    ]
    problems += [
        f"{place}: {kind.kind} needs the argument {argument}"
        for argument, needed in arguments.items()
        if needed and argument not in spec
    ]
    problems += [
        f"{place}: {problem}"
        for argument in given
        if argument in arguments and (problem := wrong_type(kind, argument, spec[argument]))
    ]
    return problems or _value_problems(place, spec, reward_timeout_s)


def _value_problems(place: str, spec: Specs, reward_timeout_s: float) -> list[str]:
    try:
        part = _make(spec)
    except ConfigError as error:
        return [f"{place}: {error}"]
    if isinstance(part, RemotePart) and part.deadline_s >= reward_timeout_s:
        problem = (
            f"{place}: timeout_s={part.timeout_s:g} x {part.retries + 1} tries is not below generator.reward_timeout_s="
            f"{reward_timeout_s:g}, which would kill the worker first; raise that, or lower timeout_s or retries"
        )
        return [problem]
    return []


def _weight_problems(name: Any, weight: Any, known: list[str] | None) -> list[str]:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        return [f"reward.weights.{name}={weight} must be a finite number"]
    if not isinstance(name, str) or (known is not None and name not in known):
        near = _nearest(str(name), known or [])
        return [f"reward.weights.{name}: there is no such part{near}; parts are {', '.join(known or [])}"]
    return []


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# -- rewards ---------------------------------------------------------------------------------------------------------


class RewardParts:
    """The parts of a run, ready to score: the task's own, then those computed here, then those that servers compute.

    Requests of all completions of a job go out at its start, `concurrency` of a part at a time, in the order of the
    completions. So once a completion's values are in, those of the next are under way: when results are read in order,
    none takes longer after the one before it than the longest deadline of a part, and what its local parts take.
    """

    def __init__(self, task: Task, parts: Mapping[str, Part], weights: Mapping[str, float]):
        self._task = task
        self._weights = weights
        self._named_by_weights = set(weights) - set(parts)  # must be the task's
        self._local = {name: part for name, part in parts.items() if not isinstance(part, RemotePart)}
        self._remote = {name: part for name, part in parts.items() if isinstance(part, RemotePart)}
        self._endpoints = {name: _endpoint(part) for name, part in self._remote.items()}
        self._loop = LoopThread() if self._remote else None
        self._keys = [key for part in self._remote.values() if (key := part.api_key())]

    def begin(self, samples: Sequence[Sample]) -> list[Callable[[], dict[str, float]]]:
        """Starts the requests of all samples; each returned function gives one sample's values, in their order.

        Each must be called once. It raises RewardError or DeadlineExceeded, which say why there is no reward, or
        whatever the task or a rule raises.
        """
        under_way = [self._request(sample) for sample in samples]
        return [
            functools.partial(self._values, sample, requests)
            for sample, requests in zip(samples, under_way, strict=True)
        ]

    def _request(self, sample: Sample) -> dict[str, concurrent.futures.Future[float]]:
        if self._loop is None:
            return {}
        return {
            name: self._loop.submit(part.fetch(self._endpoints[name], sample)) for name, part in self._remote.items()
        }

    def _values(self, sample: Sample, requests: dict[str, concurrent.futures.Future[float]]) -> dict[str, float]:
        try:
            values = dict(checked_reward(self._task, sample.completion, sample.payload))
            self._check_names(values)
            for name, part in self._local.items():
                values[name] = self._named(name, part.value, sample)
            for name, request in requests.items():
                values[name] = self._named(name, _result_within(self._remote[name].deadline_s + _GRACE_S), request)
        finally:
            for request in requests.values():
                request.cancel()
        if not values:
            raise RewardError("the reward has no parts: the task gives none, and reward.parts is empty")
        if problem := reward_parts_problem(values) or reward_problem(
            weighted_sum(values, self._weights), "weighted sum of the reward's parts"
        ):
            raise RewardError(problem)
        return values

    def _named(self, name: str, compute: Callable[[Any], float], argument: Any) -> float:
        """The value, with the part's name in what is raised instead of it, and no key."""
        try:
            value = compute(argument)
        except (RewardError, DeadlineExceeded) as error:
            raise type(error)(f"{name}: {redacted(str(error), self._keys)}") from None
        if not math.isfinite(value):
            raise RewardError(f"{name} is {value}, which is not finite")
        return value

    def _check_names(self, own: Mapping[str, float]) -> None:
        """The task's own names are known for certain only now, unless it declares them."""
        if taken := own.keys() & (self._local.keys() | self._remote.keys()):
            raise RewardError(f"reward.parts.{min(taken)}: the task has a part of this name too; choose another")
        said = getattr(self._task, "part_names", None)
        names = set(own if said is None else said)
        if missing := self._named_by_weights - names:
            raise RewardError(
                f"reward.weights.{min(missing)}: there is no such part; the task has {', '.join(sorted(names))}"
            )


def _result_within(timeout_s: float) -> Callable[[concurrent.futures.Future[float]], float]:
    def result(request: concurrent.futures.Future[float]) -> float:
        concurrent.futures.wait([request], timeout_s)
        if not request.done():
            raise DeadlineExceeded(f"no value within {timeout_s:g} s, and nobody said why")
        return request.result()

    return result


def _endpoint(part: RemotePart) -> HttpEndpoint:
    return HttpEndpoint(
        part.url,
        timeout_s=part.timeout_s,
        retries=part.retries,
        concurrency=part.concurrency,
        api_key=part.api_key(),
    )

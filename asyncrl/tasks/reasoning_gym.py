"""Puzzles without end from reasoning-gym (https://github.com/open-thought/reasoning-gym), made and scored by it.

    task:
      path: asyncrl.tasks.reasoning_gym:ReasoningGym
      args:
        datasets:
          chain_sum: {weight: 2, config: {max_terms: 4}}
          leg_counting: {curriculum: 2000}

An entry is a pure function of the data set's configuration and of a seed, so a payload names these, and the reward
worker makes the entry anew. `asyncrl/tasks/README.md` is the manual; it lists the data sets that need a word.
"""

from __future__ import annotations

import contextlib
import decimal
import hashlib
import importlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from asyncrl.errors import RewardError, TaskError
from asyncrl.tasks.base import Example, Messages
from asyncrl.tasks.data.order import Shares
from asyncrl.tasks.data.results import as_number
from asyncrl.tasks.data.wording import nearest
from asyncrl.types import REWARD_PART_NAME

INSTALL = 'pip install "reasoning-gym==0.1.25"'
SYSTEM = (
    "Think step by step. Then give the final answer alone, between <answer> and </answer>. "
    "Where the question shows an example of an answer, follow its form exactly."
)
PLAIN_TEMPLATE = "Question: {question}\nAnswer:"

# A data set is made for a run of seeds at once: some draw lists of their `size`, which bounds the index.
CHUNK = 500
# Data sets seed numpy with seed + index, which must stay below 2**32. The held-out ones are the upper half.
MAX_SEED = 2**30
MAX_INDEX = 2**30
EVAL_SEED = 2**31
DIGEST_CHARACTERS = 16

_ENTRY_KEYS = ("weight", "config", "level", "curriculum")
_FORMS = ("tags", "last_line", "completion")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Puzzles:
    """One data set of the task. `levels` counts those of its curriculum up to the one asked for; None: none is used."""

    name: str
    weight: float
    config: Mapping[str, Any]
    levels: int | None
    curriculum: int

    def level_at(self, number: int) -> int | None:
        """The level of training prompt `number` of this data set: in equal stages from 0 to the last."""
        if self.levels is None:
            return None
        if number >= self.curriculum:
            return self.levels - 1
        return number * self.levels // self.curriculum


class ReasoningGym:
    """Questions of one or several data sets of reasoning-gym. The reward part of each is its score, under its name.

    datasets: a name, a list of names, or name -> weight, or name -> {weight (1), config, level, curriculum}. config: of
    the data set. level: of its curriculum, from 0. curriculum: a number of prompts of this data set, in which it rises
    to that level (without one, to the highest). Evaluations ask on the last level. What config says wins over levels.

    answer: where a completion has its answer: `tags`, between the last <answer> and </answer>; `last_line`; or
    `completion`, all of it. Without one, the score is 0. chat: prompts are chat messages; system: the first of them, or
    "" for none; template: of what the user says, or of the plain prompt. seed: 0 to 2**30.
    """

    train_size = None

    def __init__(
        self,
        datasets: str | Sequence[str] | Mapping[str, Any],
        *,
        answer: str = "tags",
        chat: bool = True,
        system: str | None = None,
        template: str = "",
        seed: int = 0,
    ):
        if answer not in _FORMS:
            raise TaskError(f"task.args.answer={answer!r:.60}{nearest(str(answer), _FORMS)}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise TaskError(f"task.args.seed={seed!r:.60} must be an integer from 0 to 2**30")
        if template and "{question}" not in template:
            raise TaskError(f"task.args.template={template!r:.80} must have the place {{question}}")
        self._puzzles = [_puzzles(name, spec) for name, spec in _named(datasets)]
        self._trained = [puzzles for puzzles in self._puzzles if puzzles.weight > 0]
        if not self._trained:
            raise TaskError("every data set of task.args.datasets has weight 0: none is left to train on")
        self._shares = Shares([puzzles.weight for puzzles in self._trained])
        self._answer, self._seed = answer, seed
        self._chat = chat
        self._system = (SYSTEM if answer == "tags" else "") if system is None else system
        self._template = template or ("{question}" if chat else PLAIN_TEMPLATE)
        self.part_names = tuple(puzzles.name for puzzles in self._puzzles)

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`."""
        if index >= MAX_INDEX:
            raise TaskError(f"index={index}: a seed has {MAX_INDEX} examples; go on with another task.args.seed")
        who, number = self._shares.of(index)
        puzzles = self._trained[who]
        return self._example(puzzles, puzzles.level_at(number), self._seed, number)

    def eval_examples(self, count: int) -> list[Example]:
        """As many of each data set; see `Task.eval_examples`."""
        examples = []
        for place in range(count):
            number, who = divmod(place, len(self._puzzles))
            puzzles = self._puzzles[who]
            level = None if puzzles.levels is None else puzzles.levels - 1
            examples.append(self._example(puzzles, level, EVAL_SEED + self._seed, number))
        return examples

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """The data set's score of the answer, from 0 to 1."""
        name = payload["dataset"]
        found = _found_answer(completion, self._answer)
        if found is None:
            return {name: 0.0}
        puzzle = _puzzle(name, _config_key(payload["config"]), payload["level"], payload["seed"], payload["index"])
        if _digest(puzzle.entry["question"]) != payload["question"]:
            raise RewardError(
                f"{name}: the question made here is not the one that was asked. Learner and generators need one "
                "version of reasoning-gym, and the same PYTHONHASHSEED where the reward runs in a process of your own"
            )
        with _own_state(payload["seed"] + payload["index"]):
            score = as_number(puzzle.dataset.score_answer(found, puzzle.entry))
        if score is None or not 0 <= score <= 1:
            raise RewardError(f"{name}: score_answer gave {score!r:.80} for {found!r:.80}, not a number from 0 to 1")
        return {name: score}

    def _example(self, puzzles: _Puzzles, level: int | None, seed: int, number: int) -> Example:
        chunk, place = divmod(number, CHUNK)
        start = seed + chunk * CHUNK
        puzzle = _puzzle(puzzles.name, _config_key(puzzles.config), level, start, place)
        question = puzzle.entry["question"]
        payload = {
            "dataset": puzzles.name,
            "config": dict(puzzles.config),
            "level": level,
            "seed": start,
            "index": place,
            "question": _digest(question),
        }
        return Example(self._prompt(question), payload)

    def _prompt(self, question: str) -> str | Messages:
        text = self._template.replace("{question}", question)
        if not self._chat:
            return f"{self._system}\n\n{text}" if self._system else text
        asked = [{"role": "user", "content": text}]
        return [{"role": "system", "content": self._system}, *asked] if self._system else asked


# -- entries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Puzzle:
    """A data set of reasoning-gym and one entry of it: {question, answer, metadata}."""

    dataset: Any
    entry: dict[str, Any]


def _config_key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


@lru_cache(maxsize=64)  # a group's completions are scored one after another, and some entries take seconds
def _puzzle(name: str, config: str, level: int | None, seed: int, index: int) -> _Puzzle:
    with _own_state(seed + index):
        dataset = _dataset(name, config, level, seed)
        return _Puzzle(dataset, dataset[index])


@lru_cache(maxsize=256)
def _dataset(name: str, config: str, level: int | None, seed: int) -> Any:
    _, factory = _library()
    settings = _settings(name, json.loads(config), level)
    return factory.create_dataset(name, **(settings | {"seed": seed, "size": CHUNK}))


@contextlib.contextmanager
def _own_state(seed: int) -> Iterator[None]:
    """The module's random numbers and decimal context, which some data sets use, as no entry before left them."""
    before = random.getstate()
    random.seed(seed)
    try:
        with decimal.localcontext(decimal.DefaultContext):
            yield
    finally:
        random.setstate(before)


def _settings(name: str, config: Mapping[str, Any], level: int | None) -> dict[str, Any]:
    """The fields of the data set's configuration: those of the level, and above them `config`."""
    if level is None:
        return dict(config)
    _, factory = _library()
    curriculum = factory.create_curriculum(name)
    curriculum.set_global_level(level)
    of_level = curriculum.generate_configuration()
    return {field.name: getattr(of_level, field.name) for field in fields(of_level)} | dict(config)


def _library() -> tuple[Any, Any]:
    """The package, which registers its data sets, and its factory. Raises TaskError where it is not installed."""
    try:
        return importlib.import_module("reasoning_gym"), importlib.import_module("reasoning_gym.factory")
    except ModuleNotFoundError as error:
        raise TaskError(f"there is no module {error.name}: {INSTALL}") from error


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:DIGEST_CHARACTERS]


def _found_answer(completion: str, form: str) -> str | None:
    """The answer of a completion, without blanks around it; None where there is none."""
    if form == "tags":
        tagged = _TAGGED.findall(completion)
        found = tagged[-1].strip() if tagged else ""
    elif form == "last_line":
        found = completion.strip().rpartition("\n")[2].strip()
    else:
        found = completion.strip()
    return found or None


# -- arguments -------------------------------------------------------------------------------------------------------


def _named(datasets: object) -> list[tuple[str, object]]:
    """Name and entry of each data set. Raises TaskError for what says none."""
    if isinstance(datasets, str) and datasets:
        return [(datasets, {})]
    if isinstance(datasets, Mapping) and datasets:
        return list(datasets.items())
    if isinstance(datasets, Sequence) and datasets and len(set(map(str, datasets))) == len(datasets):
        return [(name, {}) for name in datasets]
    raise TaskError(f"task.args.datasets={datasets!r:.80} must name data sets, each once, such as chain_sum")


def _puzzles(name: object, spec: object) -> _Puzzles:
    """One data set that is asked for. Raises TaskError naming what is wrong with it."""
    place = f"task.args.datasets.{name}"
    _, factory = _library()
    known = [key for key in factory.DATASETS if key != "composite"]
    if name == "composite":
        raise TaskError(f"{place}: name the data sets themselves, each with its weight")
    if not isinstance(name, str) or name not in known:
        raise TaskError(f"{place} is no data set of reasoning-gym{nearest(str(name), known)}")
    assert REWARD_PART_NAME.fullmatch(name), name
    spec = {} if spec is None else {"weight": spec} if isinstance(spec, int | float) else spec
    if not isinstance(spec, Mapping):
        raise TaskError(f"{place} must be a weight, or a mapping of {', '.join(_ENTRY_KEYS)}, not {spec!r:.80}")
    if unknown := [str(key) for key in spec if key not in _ENTRY_KEYS]:
        raise TaskError(f"{place} has no {unknown[0]}{nearest(unknown[0], _ENTRY_KEYS)}")
    weight = spec.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise TaskError(f"{place}: weight={weight!r:.60} must be a number, 0 or more")
    config = spec.get("config") or {}
    levels, curriculum = _levels(place, name, spec)
    puzzles = _Puzzles(name, float(weight), config, levels, curriculum)
    _check_config(place, puzzles)
    return puzzles


def _levels(place: str, name: str, spec: Mapping[str, Any]) -> tuple[int | None, int]:
    """How many levels are used (None: no curriculum), and in how many prompts they are gone through."""
    level, curriculum = spec.get("level"), spec.get("curriculum", 0)
    for key, value in (("level", 0 if level is None else level), ("curriculum", curriculum)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TaskError(f"{place}: {key}={value!r:.60} must be an integer, 0 or more")
    if level is None and not curriculum:
        return None, 0
    _, factory = _library()
    if name not in factory.CURRICULA:
        raise TaskError(f"{place}: reasoning-gym has no curriculum of it; leave out level and curriculum")
    last = max(len(attribute.levels) for attribute in factory.create_curriculum(name).attributes.values()) - 1
    if level is not None and level > last:
        raise TaskError(f"{place}: level={level}, and the highest of its curriculum is {last}")
    return (last if level is None else level) + 1, curriculum


def _check_config(place: str, puzzles: _Puzzles) -> None:
    """Raises TaskError where the configuration, on the first or the last level, is none of the data set."""
    config = puzzles.config
    _, factory = _library()
    config_class = factory.DATASETS[puzzles.name][1]
    names = [field.name for field in fields(config_class) if field.name not in ("seed", "size")]
    if not isinstance(config, Mapping):
        raise TaskError(f"{place}: config={config!r:.80} must be a mapping")
    if unknown := [str(key) for key in config if key not in names]:
        hint = " (the task counts seeds itself)" if unknown[0] in ("seed", "size") else ""
        raise TaskError(f"{place}.config has no {unknown[0]}{hint or nearest(unknown[0], names)}")
    for level in dict.fromkeys([puzzles.level_at(0), None if puzzles.levels is None else puzzles.levels - 1]):
        try:
            settings = config_class(**(_settings(puzzles.name, config, level) | {"seed": 0, "size": CHUNK}))
            if hasattr(settings, "validate"):
                settings.validate()
        except Exception as error:  # the library's own checks raise whatever they like
            at = "" if level is None else f" at level {level}"
            raise TaskError(f"{place}: config={dict(config)!r:.200}{at}: {type(error).__name__}: {error}") from error

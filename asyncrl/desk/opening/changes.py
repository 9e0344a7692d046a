"""What a run that is started again has other than before, and whether it is still the same run.

Each configuration key says where it is declared what a change of it means (`config.declaration.IfChanged`); the keys
for which that depends on the values have their rule here. A digest that differs is always refused: prompts, rewards or
the initial weights are others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from asyncrl.config.declaration import IfChanged
from asyncrl.config.keys import keys_by_name
from asyncrl.desk.opening.run_record import RunRecord
from asyncrl.host.fingerprints import ABSENT, Difference, differences
from asyncrl.tasks.fingerprint import value_text
from asyncrl.types import Setting

MAX_SHOWN = 200  # characters of a value in a message

# Why a key cannot change in a run, where that is not plain.
REASONS = {
    "learner.groups_per_step": "pacing counts the groups of all steps of a run by it",
    "sampling.group_size": "groups of the old size wait in the journal",
    "model.max_length": "it decides which prompts fit, and so which prompt each number of the run stands for",
    "sampling.max_new_tokens": "it decides which prompts fit, and so which prompt each number of the run stands for",
    "algorithm.kl_coef": "its present value is part of the checkpoint",
}


@dataclass(slots=True)
class Changes:
    """Sentences about what differs: what makes it another run, and what the run goes on with."""

    refused: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)


def changes_since(record: RunRecord, settings: Iterable[Setting], reached: int) -> Changes:
    """Compares the settings of this start with those of the last one; `reached` is the version that the run is at."""
    changes = Changes()
    for difference in differences(_with_defaults(record), settings):
        key = keys_by_name().get(difference.name)
        if key is None and (not record.knows_files or not difference.name.startswith("file ")):
            continue  # of another release: it did not know the digest, or a key that is no longer there
        problem = _problem(difference, key.if_changed if key is not None else IfChanged.REFUSED, reached)
        line = f"{difference.name}: {_shown(difference.before)} before, {_shown(difference.after)} now"
        if problem is None:
            changes.accepted.append(line)
        else:
            changes.refused.append(f"{line}{problem}")
    return changes


def _with_defaults(record: RunRecord) -> list[Setting]:
    """The recorded settings, with the default of every key that there was not then."""
    known = dict(record.settings)
    defaults = {name: value_text(key.default) for name, key in keys_by_name().items()}
    return [Setting(name, value) for name, value in (defaults | known).items()]


def _problem(difference: Difference, if_changed: IfChanged, reached: int) -> str | None:
    """Why the run cannot go on with the change, to be put behind it; None if it can."""
    if if_changed is IfChanged.RULED:
        problem = RULES[difference.name](difference, reached)
        return f" ({problem})" if problem else None
    if if_changed is IfChanged.REFUSED:
        reason = REASONS.get(difference.name, "")
        return f" ({reason})" if reason else ""
    return None


def _steps_rule(difference: Difference, reached: int) -> str:
    """More steps are trained; fewer only as long as they are not trained yet."""
    if json.loads(difference.after) >= reached:
        return ""
    return f"the run is at version {reached} already"


def _max_age_rule(difference: Difference, reached: int) -> str:
    """Groups that were leased under the larger bound would be over the smaller one, and dropped."""
    del reached
    if difference.before != ABSENT and json.loads(difference.after) >= json.loads(difference.before):
        return ""
    return "acknowledged groups that the larger age allowed would be dropped"


RULES: dict[str, Callable[[Difference, int], str]] = {"run.steps": _steps_rule, "staleness.max_age": _max_age_rule}


def _shown(value: str) -> str:
    return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."

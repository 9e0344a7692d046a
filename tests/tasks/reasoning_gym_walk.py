"""Goes through every data set of reasoning-gym, and says what it found: `OUT.json forwards|backwards [NAME ...]`.

For each data set without a level, and on the first and the last level of its curriculum: a digest of some entries with
what their own answer scores, or what was raised; and the seconds of the slowest entry.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

from asyncrl.tasks import reasoning_gym as tested
from asyncrl.tasks.base import checked_reward
from asyncrl.tasks.payloads import plain_payload

TOO_SLOW = {("jugs", 3)}  # minutes, and then an error; listed in the manual
NUMBERS = (0, 1, tested.CHUNK, 10**6)


def walk(name: str, step: int) -> dict:
    factory = tested._library()[1]
    tasks = {"": tested.ReasoningGym(name, answer="completion")}
    found: dict = {"entries": {}, "seconds": 0.0}
    levels = 0
    if name in factory.CURRICULA:
        levels = max(len(attribute.levels) for attribute in factory.create_curriculum(name).attributes.values())
    for level in sorted({0, levels - 1}) if levels else ():
        if (name, level) in TOO_SLOW:
            continue
        try:
            tasks[f"level {level}"] = tested.ReasoningGym({name: {"level": level}}, answer="completion")
        except tested.TaskError as error:
            found["entries"][f"level {level}"] = str(error)
    for kind, task in list(tasks.items())[::step]:
        for number in (NUMBERS if not kind else NUMBERS[:1])[::step]:
            start = time.monotonic()
            try:
                result = entry(task, name, number)
            except Exception as error:  # noqa: BLE001 - what the library raises is the finding
                result = f"{type(error).__name__}: {error}"
            found["entries"][f"{kind} {number}".strip()] = result
            found["seconds"] = max(found["seconds"], time.monotonic() - start)
    return found


def entry(task: tested.ReasoningGym, name: str, number: int) -> list:
    """Digest of the entry, and what its own answer scores (None: it has none)."""
    payload = plain_payload(task.train_example(number).payload, 4096)
    place = (payload["level"], payload["seed"], payload["index"])
    made = tested._puzzle(name, tested._config_key(payload["config"]), *place).entry
    answer = made["answer"]
    score = None if answer is None else checked_reward(task, answer, payload)[name]
    checked_reward(task, "no answer at all", payload)
    return [hashlib.sha256(repr(made).encode()).hexdigest()[:16], score]


def main() -> None:
    names = sorted(sys.argv[3:]) or sorted(set(tested._library()[1].DATASETS) - {"composite"})
    step = -1 if sys.argv[2] == "backwards" else 1
    with open(sys.argv[1], "w") as file:
        json.dump({name: walk(name, step) for name in names[::step]}, file)


if __name__ == "__main__":
    main()

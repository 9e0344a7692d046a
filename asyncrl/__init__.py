"""Asynchronous, off-policy actor-learner reinforcement learning for language models.

Two commands run it: `asyncrl-learner` trains (`asyncrl.cli.learner`), and `asyncrl-generator` samples and rewards
(`asyncrl.cli.generator`); both take one configuration file.

What other programs may build on:

    asyncrl.tasks.base      a task of one's own: prompts in, rewards out
    asyncrl.rewards.base    a kind of reward of one's own
    asyncrl.config          the configuration as dataclasses; `asyncrl.config.loading.load_config` reads a file
    asyncrl.algorithms      advantages, losses, corrections and KL: pure functions of tensors, each with its paper
    asyncrl.metrics         the records of metrics.jsonl; `asyncrl report` sums up a run
    asyncrl.errors, asyncrl.types

    from asyncrl import load_config, run_learner

    run_learner(load_config("quickstart.yaml", ["model.path=FOLDER"]))

The names of `__all__` are imported when they are first asked for: importing `asyncrl` imports nothing else.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

# Public name -> the module it is from; `__init__.pyi` says the same to type checkers.
_PLACES = {
    "Config": "asyncrl.config",
    "load_config": "asyncrl.config.loading",
    "run_learner": "asyncrl.cli.run",
    "run_generator": "asyncrl.cli.run",
    "StopSignal": "asyncrl.host.processes",
    "Task": "asyncrl.tasks.base",
    "Example": "asyncrl.tasks.base",
    "load_task": "asyncrl.tasks.base",
    "Part": "asyncrl.rewards.base",
    "read_records": "asyncrl.metrics",
    "AsyncRLError": "asyncrl.errors",
    "UserError": "asyncrl.errors",
}
__all__ = [
    "AsyncRLError",
    "Config",
    "Example",
    "Part",
    "StopSignal",
    "Task",
    "UserError",
    "__version__",
    "load_config",
    "load_task",
    "read_records",
    "run_generator",
    "run_learner",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
    value = getattr(_import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

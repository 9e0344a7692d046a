"""Checks the section `reward` before anything is started. Imports no torch, zmq or vllm."""

from __future__ import annotations

from collections.abc import Collection

from asyncrl.config import Config
from asyncrl.config.checks import raise_all
from asyncrl.rewards.parts import check_reward_parts, make_parts, prepare_parts
from asyncrl.tasks.trial import task_part_names


def check_rewards(config: Config, role: str) -> None:
    """Checks the parts of the reward and their weights.

    The role "generator" computes rewards, so there the keys, folders and modules that the parts need are checked too.
    Raises ConfigError naming every problem, or TaskError when the task must be asked for its parts and cannot be.
    """
    reward = config.reward
    problems = check_reward_parts(
        reward.parts,
        reward.weights,
        task_parts=_task_parts(config),
        reward_timeout_s=config.generator.reward_timeout_s,
    )
    raise_all(problems)
    if role == "generator":
        raise_all(prepare_parts(make_parts(reward.parts)))


def _task_parts(config: Config) -> Collection[str] | None:
    """Names of the task's own parts; None when it does not say. The task is made only where the names matter."""
    if not config.reward.parts and not config.reward.weights:
        return None
    return task_part_names(config.task.path, config.task.args)

"""Asynchronous, off-policy actor-learner reinforcement learning for language models.

Two commands run it: `asyncrl-learner` trains (`asyncrl.cli.learner`), and `asyncrl-generator` samples and rewards
(`asyncrl.cli.generator`); both take one configuration file.

What other programs may build on:

    asyncrl.tasks.base      a task of one's own: prompts in, rewards out
    asyncrl.rewards.base    a kind of reward of one's own
    asyncrl.config          the configuration as dataclasses; `asyncrl.config.loading.load_config` reads a file
    asyncrl.algorithms      advantages, losses, corrections and KL: pure functions of tensors, each with its paper
    asyncrl.metrics         the records of metrics.jsonl; `asyncrl.report.summary` sums up a run
    asyncrl.errors, asyncrl.types

Importing `asyncrl` imports nothing else.
"""

__version__ = "0.1.0"

"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): a group whose rewards are all equal teaches
nothing, so it is not trained on and another prompt is leased in its place.

How far that goes is bounded, or a task that is solved (or hopeless) would be sampled for ever. With G = groups_per_step
and everything counted since the last batch was taken, a group with equal rewards is left out only while

    left out  <  16 * (G + groups whose rewards differ)

and taken like any other beyond that. So a batch is full after at most 32 * G groups left out, and after 16 * G when all
rewards are equal; where fewer than about one group in 16 has a signal, batches are topped up with groups without one.

The rule depends on the order in which results arrive. That is no matter for a restart: what was left out is in the
journal and is not decided again. The counts themselves begin at zero with each start of the learner.
"""

from __future__ import annotations

from asyncrl.types import Group

MAX_FILTERED_PER_GROUP = 16


class DynamicSampling:
    """Decides which groups are left out."""

    def __init__(self, groups_per_step: int) -> None:
        self._groups_per_step = groups_per_step
        # Both since the last batch was taken.
        self.num_filtered = 0
        self.num_differing = 0

    def leaves_out(self, rewards_are_equal: bool) -> bool:
        """Whether the group that has just come in is left out. Each group is asked for once."""
        if not rewards_are_equal:
            self.num_differing += 1
            return False
        if self.num_filtered >= MAX_FILTERED_PER_GROUP * (self._groups_per_step + self.num_differing):
            return False
        self.num_filtered += 1
        return True

    def batch_taken(self) -> None:
        """The next batch has its own bound."""
        self.num_filtered = self.num_differing = 0


def has_equal_rewards(group: Group) -> bool:
    """Whether no two rewards that are compared with each other differ.

    A rollout whose reward failed is not in the group and equals nothing. The reward of the greedy completion counts
    where there is one, because rollouts are compared with it. One reward alone is not equal to anything.
    """
    rewards = [rollout.reward for rollout in group.rollouts]
    if group.baseline_reward is not None:
        rewards.append(group.baseline_reward)
    return len(rewards) > 1 and min(rewards) == max(rewards)

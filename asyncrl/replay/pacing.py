"""How many groups may be under way, and when a batch may be taken, so that no token gets too old.

Words: G = groups_per_step, A = max_age. A lease is issued to a generator that proved it holds version g; no
token of its group can be older than g. The batch that makes version v + 1 is taken at version v, and the
policy age of its tokens is v minus their version. The aim is age <= A for every trained token without ever
throwing a group away.

Admission (`ceiling`). A lease is granted at held version g only while

    admitted < (g + A + 1) * G        admitted = groups trained, in training, buffered and running

This is AReaL's bound (Fu et al. 2025, arXiv 2505.24298, section 5.1) with the version that *this generator
proved* in place of the learner's own: a generator that missed a weight sync is paced by what it can really
sample from. Failed, expired and dropped groups leave `admitted`; their ordinals are leased again, lowest
first. Given-up and filtered ones (`replay.filtering`) leave it too; new ordinals take their place.

Taking a batch (`straggling_version`). With v steps taken, for every version i,

    F(v):  #{running, issued at <= i} + #{buffered, oldest token <= i}  <=  (i + A + 1 - v) * G

says that what has to be trained by version i + A fits into the batches left until then. It always holds:
- F(0): nothing is outstanding.
- A grant at g keeps it. Afterwards admitted <= (g + A + 1) * G and v * G groups are trained, so at most
  (g + A + 1 - v) * G are outstanding, which bounds the left side for every i >= g; for i < g it did not change.
- A result keeps it (no token is older than its lease); a failure, expiry or drop lowers the left side, and so
  does a result that is filtered: its lease ends, and nothing comes into the buffer. The lease in its place is a
  grant like any other, at a version that is proven then.
- Taking the G groups with the oldest tokens keeps it, if the learner waits where it must. Let m be the newest
  of their oldest tokens. For i >= m both sides fall by G. For i < m the batch holds all such buffered groups,
  and F(v + 1) asks for

      #{running, issued at <= i}  <=  (i + A - v) * G        for every i < m

  which is the rule: while it does not hold, the learner waits for one of those leases.
F(v) for i = v - A - 1 says that nothing outstanding is over-age, so every trained token has age <= A and
nothing is dropped. For i = v - A: the groups that must be trained now fit into one batch, and no other lease
may still run that is as old. With A = 0 leases are granted at g = v only, G of them, and exactly these G are
the next batch: synchronous training (a batch is sorted, so arrival order does not matter either).

The wait is bounded: each lease it waits for ends by its deadline, and as the buffer fills, `admitted` passes
the ceiling of the old versions, so that no more leases as old are granted. It does fill: how many groups are
filtered before a batch is taken is bounded as well.

It would not be enough to wait only for leases that are over-age at the next step. With G = 1, A = 2:

    leases.grant("a", 0, room=3)   # v=0  a0 a1 a2 run, issued at 0; admitted 3 = (0 + 2 + 1) * 1
    a2 finishes                    # v=0  taking it leaves 2 running, and 2 <= (0 + 2 - 0) * 1: trained, v=1
    leases.grant("b", 1, room=9)   # v=1  b3 is issued at 1; admitted 4 = (1 + 2 + 1) * 1
    b3 finishes                    # v=1  taking it would leave a0 a1, 2 > (0 + 2 - 1) * 1: one of them
                                   #      would be trained at version 3, with age 3. The learner waits
    a0 finishes                    # v=1  takes a0, the oldest (age 1); v=2 a1 (age 2); v=3 b3 (age 2)

Outside of the proof are late results of expired leases. They are welcome, but may be over-age or make others
so; that is checked again where groups are consumed (`ReplayBuffer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pacing:
    """The three numbers of the rule: groups in a batch, largest policy age, optimizer steps of the run."""

    groups_per_step: int
    max_age: int
    steps: int

    @property
    def total_groups(self) -> int:
        """Groups that the whole run trains on."""
        return self.steps * self.groups_per_step

    def ceiling(self, held_version: int) -> int:
        """A lease may be granted at `held_version` while fewer groups than this are admitted."""
        return min(held_version + self.max_age + 1, self.steps) * self.groups_per_step

    def straggling_version(self, version: int, newest_taken: int, running_by_version: Mapping[int, int]) -> int | None:
        """Why a batch must wait at `version`: the version at or below which too many leases run.

        newest_taken        newest of the oldest-token versions of the groups in the batch
        running_by_version  how many running training leases were issued at each version
        None means that the batch may be taken. Only versions with running leases need a look: in between, the
        count stays and its limit grows.
        """
        num_running = 0
        for issued in sorted(running_by_version):
            if issued >= newest_taken:
                break
            num_running += running_by_version[issued]
            if num_running > (issued + self.max_age - version) * self.groups_per_step:
                return issued
        return None

"""Which policy versions the learner has committed for whom, in its own words.

What a generator says of itself is no proof of what it was told: a trained token is judged by the learner's log, which
names every commit (with log.level=debug). The order is seen by looking again and again, at log and metrics: a commit
that was not there yet when a step already was came after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

COMMITTED = re.compile(r"DEBUG (\S+) \(incarnation (\d+)\) committed version (\d+)$")

Commit = tuple[str, int, int]  # generator, incarnation, policy version
Commits = Mapping[Commit, int]  # → the policy version that there certainly was before it


class CommitLog:
    """Follows one learner. `commits` has the first commit of each version."""

    def __init__(self) -> None:
        self.commits: dict[Commit, int] = {}
        self._num_lines = 0
        self._version = 0  # at the last look, so before all lines that are new now

    def look(self, version: int, lines: Sequence[str]) -> None:
        """`version`: the newest that has a metrics line, read *before* `lines`, which are the whole log so far."""
        for line in lines[self._num_lines :]:
            if found := COMMITTED.search(line):
                self.commits.setdefault((found[1], int(found[2]), int(found[3])), self._version)
        self._num_lines, self._version = len(lines), version


def why_unproven(commits: Commits, commit: Commit, batch: int) -> str:
    """Why no token of that version may be in the batch of the step from version `batch`; empty = it may."""
    name, incarnation, version = commit
    who = f"for {name} (incarnation {incarnation})"
    if commit not in commits:
        return f"version {version}, which the learner never committed {who}"
    if commits[commit] > batch:
        return f"version {version}, which the learner committed {who} after it had taken the step to {batch + 1}"
    return ""

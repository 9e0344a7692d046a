"""Which generator proved which policy version: tokens of a version count only from a generator that proved it.

Memory is bounded: of at most MAX_GENERATORS generators the newest incarnation is remembered, with the newest
KEPT_VERSIONS versions that it proved. That is enough: a lease that runs is at most max_age + 1 versions old, and what
comes later than KEPT_VERSIONS swaps of its own generator is refused like a version that was never proven.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from asyncrl.desk.run_state import PolicyVersions
from asyncrl.errors import ProtocolError
from asyncrl.link.desk_session import DeskSession
from asyncrl.link.limits import MAX_GENERATORS
from asyncrl.types import Group

KEPT_VERSIONS = 256


@dataclass(slots=True)
class _ProvenVersions:
    incarnation: int
    versions: deque[int] = field(default_factory=deque)  # in the order of their proofs


class Proofs:
    """The versions that generators proved to this learner; max_age is the largest policy age of a trained token."""

    def __init__(self, policy: PolicyVersions, max_age: int = 0) -> None:
        self._policy = policy
        self._kept = max(KEPT_VERSIONS, 2 * max_age + 2)
        self._of: OrderedDict[str, _ProvenVersions] = OrderedDict()  # by generator, the latest proof last

    def add(self, generator_id: str, incarnation: int, version: int) -> None:
        """Notes that a generator proved `version`: from now on it may bring tokens of that version."""
        proven = self._of.get(generator_id)
        if proven is None or proven.incarnation < incarnation:
            proven = self._of[generator_id] = _ProvenVersions(incarnation, deque(maxlen=self._kept))
        if proven.incarnation == incarnation and version not in proven.versions:
            proven.versions.append(version)
        self._of.move_to_end(generator_id)
        if len(self._of) > MAX_GENERATORS:
            self._of.popitem(last=False)

    def check(self, group: Group, session: DeskSession) -> None:
        """Raises ProtocolError unless the generator proved every version that it says the group's tokens are of."""
        known = self._of.get(session.generator_id)
        proven = known.versions if known is not None and known.incarnation == session.incarnation else ()
        versions = {span.version for rollout in group.rollouts for span in rollout.version_spans}
        if unproven := sorted(v for v in versions if v > self._policy.proven_before and v not in proven):
            raise ProtocolError(
                f"{group.key} has tokens of versions {unproven}, which {session.generator_id} (incarnation "
                f"{session.incarnation}) never proved; proven are {sorted(proven)[-5:]} (the newest five; the newest "
                f"{self._kept} are remembered)"
            )

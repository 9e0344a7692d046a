"""Which generator proved which policy version: tokens of a version count only from a generator that proved it."""

from __future__ import annotations

from asyncrl.desk.run_state import PolicyVersions
from asyncrl.errors import ProtocolError
from asyncrl.link.desk_session import DeskSession
from asyncrl.types import Group


class Proofs:
    """The versions that each incarnation of each generator proved to this learner."""

    def __init__(self, policy: PolicyVersions) -> None:
        self._policy = policy
        self._proven: dict[tuple[str, int], set[int]] = {}  # (generator id, incarnation) -> versions

    def add(self, generator_id: str, incarnation: int, version: int) -> None:
        """Notes that a generator proved `version`: from now on it may bring tokens of that version."""
        self._proven.setdefault((generator_id, incarnation), set()).add(version)

    def check(self, group: Group, session: DeskSession) -> None:
        """Raises ProtocolError unless the generator proved every version that it says the group's tokens are of."""
        proven = self._proven.get((session.generator_id, session.incarnation), set())
        versions = {span.version for rollout in group.rollouts for span in rollout.version_spans}
        if unproven := sorted(v for v in versions - proven if v > self._policy.proven_before):
            raise ProtocolError(
                f"{group.key} has tokens of versions {unproven}, which {session.generator_id} (incarnation "
                f"{session.incarnation}) never proved; proven are {sorted(proven)[-5:]} (the newest five)"
            )

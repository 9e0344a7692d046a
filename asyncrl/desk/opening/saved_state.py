"""What a checkpoint holds of the desk, and its bytes: `desk_state.bin`, one msgpack map.

    leases     {next_ordinal, next_eval_ordinal, settled: {watermark, above}, given_up, num_filtered, num_left_out,
               failures, counters: {}}
    sessions   generator id → {incarnation, instance, watermark, beyond}
    account    `RunTotals`: {rollouts_acked, rollouts_dropped, groups_filtered, tokens_filtered, rollouts_failed,
               prompts_left_out}
    evals_done versions whose evaluation was asked for

Checkpoints of earlier releases hold more (counters that nobody read) or less (nothing was filtered then): both are
understood. Everything else that must survive is in the journal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import msgpack

from asyncrl.desk.counters import RunTotals
from asyncrl.errors import CheckpointError
from asyncrl.link.desk_session import SavedSession
from asyncrl.replay.lease_records import SavedLeases
from asyncrl.types import Frontier


@dataclass(frozen=True, slots=True)
class SavedDesk:
    """The desk's own state at the moment a batch was decided."""

    leases: SavedLeases
    sessions: dict[str, SavedSession] = field(default_factory=dict)
    totals: RunTotals = field(default_factory=RunTotals)
    evals_done: frozenset[int] = frozenset()

    def encode(self) -> bytes:
        """The bytes for a checkpoint."""
        packed: bytes = msgpack.packb(
            {
                "leases": _leases_to_map(self.leases),
                "sessions": {name: asdict(session) for name, session in self.sessions.items()},
                "account": asdict(self.totals),
                "evals_done": sorted(self.evals_done),
            }
        )
        return packed

    @classmethod
    def decode(cls, data: bytes) -> SavedDesk:
        """What `encode` of this release or an earlier one made. Raises CheckpointError when it is something else."""
        try:
            saved = msgpack.unpackb(data, strict_map_key=False)
            totals = saved["account"]
            return cls(
                leases=_leases_of_map(saved["leases"]),
                sessions={name: SavedSession(**session) for name, session in saved["sessions"].items()},
                totals=RunTotals(**{f.name: totals[f.name] for f in fields(RunTotals) if f.name in totals}),
                evals_done=frozenset(saved.get("evals_done", ())),
            )
        except (ValueError, TypeError, LookupError, AttributeError, msgpack.UnpackException) as error:
            raise CheckpointError(
                f"the desk's state of {len(data)} bytes cannot be decoded ({type(error).__name__}: {error}); "
                "another release wrote it: use that one"
            ) from error


def _leases_to_map(leases: SavedLeases) -> dict[str, Any]:
    return {
        "next_ordinal": leases.next_ordinal,
        "next_eval_ordinal": leases.next_eval_ordinal,
        "settled": {"watermark": leases.settled.watermark, "above": sorted(leases.settled.above)},
        "given_up": leases.given_up,
        "num_filtered": leases.num_filtered,
        "num_left_out": leases.num_left_out,
        "failures": [[ordinal, count] for ordinal, count in leases.failures.items()],
        "counters": {},  # a release that still counted leases cannot load a checkpoint without it
    }


def _leases_of_map(saved: dict[str, Any]) -> SavedLeases:
    return SavedLeases(
        next_ordinal=saved["next_ordinal"],
        next_eval_ordinal=saved["next_eval_ordinal"],
        settled=Frontier(saved["settled"]["watermark"], saved["settled"]["above"]),
        given_up=saved["given_up"],
        num_filtered=saved.get("num_filtered", 0),
        num_left_out=saved.get("num_left_out", 0),
        failures=dict(saved["failures"]),
    )

"""What a large fleet costs the desk: 1,000 connected generators that hold 12,288 leases.

    python -m benchmarks.speed.desk_load [--quick]

The real desk over real sockets in this process; generators and trainer are stubs in another one. Measured in the
desk's thread: its CPU time while nothing happens but beats, and the longest tick (from one wait to the next), by the
clock and in CPU time. In process, without generators at the sockets, and in CPU time, so that other work on the machine
does not count: how long a restarted desk takes to grant all leases again, and its longest slice of grants; how many
results a second it takes (checked, in the journal, acknowledged); how its memory grows over many results and versions.
Bars: 5 % of a core, 20 ms, 1 s, 5,000 results/s, 2 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.config import Config
from asyncrl.desk.boundary import Boundary
from asyncrl.desk.desk import FROM_GENERATOR, FROM_TRAINER, Desk
from asyncrl.host.garbage import rare_collections
from asyncrl.link.codec import decode_body, encode_body
from asyncrl.link.limits import MAX_BEAT_S
from asyncrl.link.messages import PROTOCOL_VERSION, Hello, LeaseGrant
from asyncrl.link.rollouts import group_to_result
from asyncrl.link.sockets import SocketPoller
from asyncrl.storage.journal_index import JournalIndex
from asyncrl.storage.journal_reader import Location
from asyncrl.storage.records import StepTaken, StoredGroup
from benchmarks.common import RESULTS
from benchmarks.faults.stub_fleet import NUM_TOKENS, make_stub_desk, stub_group

LONG_S = 1e6
CHECKPOINT_EVERY = 100


def settings(groups: int, max_age: int = 0) -> Config:
    """So many leases are out at once."""
    config = Config()
    config.run.steps, config.learner.groups_per_step, config.staleness.max_age = 10**6, groups, max_age
    return config


def start_fleet(desk: Desk, **options: Any) -> subprocess.Popen[bytes]:
    """The stubs' process."""
    addresses = [desk.generators.socket.address, desk.ranks.socket.address]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.faults.stub_fleet", *addresses, json.dumps(options)])


class Loop:
    """The desk's loop, turn by turn, as `Desk.run` has it."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.boundary, self.poller = desk, Boundary(desk.generators), SocketPoller()
        self.ticks: list[float] = []
        self.cpu_ticks: list[float] = []
        for source in (desk.generators.socket, desk.ranks.socket):
            self.poller.add(source)

    def turn(self) -> None:
        """One wait and what follows it, which is timed."""
        desk = self.desk
        ready = self.poller.wait(desk._timeout(time.monotonic()))
        now, cpu = time.monotonic(), time.thread_time()
        if desk.generators.socket in ready:
            self.boundary.from_generators(desk.generators.socket, FROM_GENERATOR, desk._from_generator, now)
        if desk.ranks.socket in ready:
            self.boundary.from_ranks(desk.ranks.socket, FROM_TRAINER, desk._from_trainer, now)
        desk._tick(now)
        self.ticks.append(time.monotonic() - now)
        self.cpu_ticks.append(time.thread_time() - cpu)

    def until(self, condition: Any, timeout_s: float) -> float:
        """Turns until the condition holds; the seconds that took."""
        started = time.monotonic()
        while not condition():
            self.turn()
            if time.monotonic() - started > timeout_s:
                raise SystemExit(f"not within {timeout_s:g} s")
        return time.monotonic() - started


def close(desk: Desk) -> None:
    """Gives sockets and files back."""
    for socket in (desk.generators.socket, desk.ranks.socket):
        socket.close()
    desk.state.journal.close()


def idle(folder: Path, generators: int, leases: int, seconds: float) -> dict[str, float]:
    """CPU share and longest tick of a desk to which all generators beat."""
    desk = make_stub_desk(folder, settings(leases))
    loop = Loop(desk)
    fleet = start_fleet(desk, generators=generators, room=-(-leases // generators), work_s=LONG_S)
    try:
        joined_s = loop.until(lambda: desk.state.leases.num_running == leases, 120.0)
        joining_tick_s = max(loop.cpu_ticks)
        calm_at = time.monotonic() + MAX_BEAT_S + 2.0  # every lease was named in a beat once
        loop.until(lambda: time.monotonic() > calm_at, MAX_BEAT_S + 10.0)
        loop.ticks.clear()
        loop.cpu_ticks.clear()
        cpu, started = time.thread_time(), time.monotonic()
        while time.monotonic() < started + seconds:
            loop.turn()
        share = (time.thread_time() - cpu) / (time.monotonic() - started)
    finally:
        fleet.kill()
        fleet.wait()
        close(desk)
    ticks = np.array(loop.ticks) * 1e3
    return {
        "core_share": round(share, 4),
        "longest_tick_ms": round(float(ticks.max()), 2),
        "longest_tick_cpu_ms": round(max(loop.cpu_ticks) * 1e3, 2),
        "longest_tick_cpu_while_all_join_ms": round(joining_tick_s * 1e3, 2),
        "tick_p99_ms": round(float(np.percentile(ticks, 99)), 3),
        "ticks_per_s": round(len(ticks) / seconds, 1),
        "all_proven_and_leased_s": round(joined_s, 2),
    }


def restart(folder: Path, generators: int, leases: int) -> dict[str, float]:
    """A new life of a desk whose book knows `leases` prompts that were under way: how fast all run again."""
    desk = make_stub_desk(folder, settings(leases), run_epoch=2)
    book = desk.state.leases
    book._learn_of(leases - 1)
    wire: list[float] = []
    for number in range(generators):
        name, peer = f"g{number}", b"a%d" % number
        hello = Hello(PROTOCOL_VERSION, name, 1, 1, "model", "tokenizer", "stub:Task", 1, 1, 0, name)
        desk.generators.hello(peer, hello, 0.0)
        session = desk.state.sessions.get(name)
        assert session is not None
        desk.versions.joined(name, 1, 1, 0.0)
        desk.versions._planner.receivers[name].held_version = 0
        session.liveness = session.liveness.ALIVE
        from asyncrl.link.messages import Beat

        room = -(-leases // generators) * 4
        desk.generators.beat(session, Beat(2, room, [], 1, 0, 0, 0.0, 0.0, 0, 0, 0, True, 0), 0.0)
    started = time.thread_time()
    while book.num_running < leases:
        begun = time.thread_time()
        desk.generators.grant(1.0)
        book.next_deadline(1.0)
        wire.append(time.thread_time() - begun)
    took_s = time.thread_time() - started
    close(desk)
    return {"cpu_seconds": round(took_s, 3), "longest_slice_ms": round(max(wire) * 1e3, 2), "slices": len(wire)}


def results(folder: Path, seconds: float) -> dict[str, float]:
    """Results a second that a desk takes from one frame to its acknowledgement, in process: frames as they come."""
    desk = make_stub_desk(folder, settings(10**6))
    hello = Hello(PROTOCOL_VERSION, "g0", 1, 0, "model", "tokenizer", "stub:Task", 1, 1, 0, "g0")
    desk.generators.hello(b"ag0", hello, 0.0)
    session = desk.state.sessions.get("g0")
    assert session is not None
    desk.intake._proofs.add("g0", 1, 0)
    frames = []
    for record in desk.state.leases.grant("g0", 0, int(seconds * 8000), 0, 0.0):
        assert desk.prompts.is_there(record.key.ordinal, 0.0)
        lease = desk.generators._lease(record, session, 0.0)
        grant = LeaseGrant(
            1, *record.key, 0, 1.0, lease.prompt_token_ids.tobytes(), {}, lease.num_rollouts, NUM_TOKENS, 1.0
        )
        result = group_to_result(stub_group(grant), len(frames) + 1, 1, lease.ticket)
        frames.append(encode_body(result))
    from asyncrl.link.messages import GroupResult

    taken, started = 0, time.thread_time()
    wall = time.monotonic()
    for body in frames:
        now = time.monotonic()
        desk.intake.group(session, decode_body(GroupResult, body), body, now)
        desk.acknowledgements.make_durable_if_due(now)
        desk.generators.acknowledge()
        desk.state.leases.next_deadline(now)
        taken += 1
    desk.acknowledgements.make_durable()
    cpu_s, wall_s = time.thread_time() - started, time.monotonic() - wall
    assert len(desk.state.buffer) == taken
    close(desk)
    return {
        "per_core_second": round(taken / cpu_s),
        "per_wall_second": round(taken / wall_s),
        "results": taken,
        "tokens_each": 4 * NUM_TOKENS,
    }


def memory(num_results: int, num_versions: int) -> dict[str, float]:
    """Growth of what Proofs, Counters, lease book and the journal's index hold, from a tenth of the way to its end."""
    from asyncrl.desk.counters import Counters
    from asyncrl.desk.proofs import Proofs
    from asyncrl.desk.run_state import PolicyVersions
    from asyncrl.link.messages import Beat
    from asyncrl.replay.lease_book import LeaseBook
    from asyncrl.replay.pacing import Pacing

    policy, counters = PolicyVersions(), Counters()
    proofs, book = Proofs(policy), LeaseBook(Pacing(num_results // num_versions, 4, num_versions + 8), 600.0)
    index = JournalIndex()
    index.begin_segment(1)
    per_step, rss = num_results // num_versions, []
    for version in range(num_versions):
        policy.newest = version
        for number in range(10):
            proofs.add(f"g{number}", 1, version)
            counters.beat(f"g{number}", 1, Beat(1, 0, [], version, 0, 0, 0.0, 0.0, 0))
        granted = book.grant(f"g{version % 10}", version, per_step, version, float(version))
        for record in granted:
            book.accept(record.key, record.holder, float(version))
            stored = StoredGroup(
                record.holder, 1, record.key.ordinal, *record.key[1:], version, version, version, (1,) * 4, b""
            )
            index.add(stored, Location(1, record.key.ordinal))
        index.add(StepTaken(version, tuple(record.key[1:] for record in granted)), Location(1, version))
        if version % CHECKPOINT_EVERY == 0:
            index.forget_before(version, 1)
        book.train(record.key for record in granted)
        if version in (num_versions // 10, num_versions - 1):
            rss.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    return {
        "results": num_results,
        "versions": num_versions,
        "rss_mib": round(rss[-1] / 2**20, 1),
        "growth": round(rss[-1] / rss[0] - 1, 4),
    }


def main() -> int:
    """Prints the figures, writes the JSON file; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small fleet and short times")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default %(default)s)")
    arguments = parser.parse_args()
    generators, leases, seconds = (100, 1200, 3.0) if arguments.quick else (1000, 12_288, 10.0)
    record: dict[str, Any] = {"generators": generators, "leases": leases}
    with tempfile.TemporaryDirectory() as folder, rare_collections():  # as in a desk that serves
        for name, measure in (
            ("memory", lambda: memory(10**4 if arguments.quick else 10**6, 10**3 if arguments.quick else 10**5)),
            ("results", lambda: results(Path(folder) / "results", 0.5 if arguments.quick else 1.5)),
            ("restart", lambda: restart(Path(folder) / "restart", generators, leases)),
            ("idle", lambda: idle(Path(folder) / "idle", generators, leases, seconds)),
        ):
            record[name] = measure()
            gc.collect()  # what one part leaves is not to be collected in the next
            print(f"{name:<10} {record[name]}", flush=True)
    record["passed"] = {
        "idle <= 5 % of a core": record["idle"]["core_share"] <= 0.05,
        "no tick over 20 ms": max(
            record["idle"]["longest_tick_cpu_ms"], record["idle"]["longest_tick_cpu_while_all_join_ms"]
        )
        <= 20.0,
        "restart <= 1 s": record["restart"]["cpu_seconds"] <= 1.0 and record["restart"]["longest_slice_ms"] <= 20.0,
        ">= 5,000 results/s": record["results"]["per_core_second"] >= 5000,
        "memory <= 2 %": record["memory"]["growth"] <= 0.02,
    }
    print(record["passed"])
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "desk_load.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(record["passed"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

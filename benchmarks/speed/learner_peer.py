"""The learner's end for benchmarks of the generator: real socket, sessions, messages and weight channel.

No trainer, but its publisher. No journal: a result counts as durable once it is checked, and is acknowledged as late as
after a journal's sync. No pacing: there is a lease whenever there is room.

A process of its own on the learner's CPU: ``python -m benchmarks.speed.learner_peer CONFIG CPU``. It takes one JSON
command per line on stdin and answers with one JSON line on stdout. `LearnerPeer` is the other end, in the generator's
process.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asyncrl.config import Config
from asyncrl.config.loading import load_config
from asyncrl.desk.opening.restoring import make_sessions
from asyncrl.errors import AsyncRLError
from asyncrl.link import messages, trainer_messages
from asyncrl.link.codec import body_of, decode, encode
from asyncrl.link.desk_session import DeskSession, Seen
from asyncrl.link.rollouts import lease_to_grant, result_to_group, validate_group
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import ServerSocket, SocketPoller
from asyncrl.link.weight_records import ChannelPlace
from asyncrl.storage.journal import DURABLE_AFTER_S
from asyncrl.types import TOKEN_DTYPE, Lease, LeaseKey, LeaseKind
from asyncrl.weights.plan.round import canary_differences

_M = TypeVar("_M", bound=Message)

FROM_PUBLISHER = trainer_messages.SnapshotReady | trainer_messages.ChannelReady | trainer_messages.BroadcastDone
RUN_EPOCH = 1
COMMAND_TIMEOUT_S = 600.0
ENGINE_START_TIMEOUT_S = 300.0
LEASE_TIMEOUT_S = 300.0
POLL_S = 0.5
PROMPT_TOKENS = 32
FIRST_TOKEN = 2  # after padding and end
GROUP_EPOCH = 1
CANARY_SEQUENCES, CANARY_LENGTH, CANARY_TOLERANCE = 4, 32, 1e-4
ANSWER = {"answer": "42"}


class Peer:
    """Serves the commands."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab_size = json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"]
        self.socket = ServerSocket("tcp://127.0.0.1:0", max_frame_bytes=config.transport.max_frame_bytes)
        self.sessions = make_sessions(config, RUN_EPOCH)
        # Now: a long silence later would make the generator reconnect.
        self.weights = Versions(config, self.socket.address)
        self.session: DeskSession | None = None
        self.version = 0
        self.replies: list[messages.SyncReply] = []
        self.publisher: bytes | None = None  # routing id
        self.published: dict[type[Message], Any] = {}  # its newest message of each type
        self.prompts = np.random.default_rng(0)
        self.leases: dict[int, Lease] = {}  # by ordinal
        self.next_ordinal = 0
        self.granted = 0
        self.wanted_groups = 0  # leases still to be granted
        self.rollouts = self.tokens = self.groups = 0
        self.ack_due = math.inf
        self.poller = SocketPoller()
        self.poller.add(self.socket)
        self.poller.add(sys.stdin.fileno())

    def serve(self) -> None:
        """Answers commands until stdin ends; the link is served all the time."""
        self._answer({"address": self.socket.address})
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "ready": self.ready,
            "sync": self.sync,
            "generate": self.generate,
            "flow": self.flow,
            "raw_join": self.raw_join,
            "raw_broadcast": self.raw_broadcast,
        }
        while True:
            if sys.stdin.fileno() in self._pump(POLL_S):
                line = sys.stdin.readline()
                if not line:
                    return
                command = json.loads(line)
                self._answer(commands[command.pop("do")](**command))

    # -- commands --------------------------------------------------------------------------------------------------

    def ready(self) -> dict[str, Any]:
        """Returns when the generator's engine is up."""
        self._until(
            lambda: self.session is not None and self.session.beat is not None and self.session.beat.ready,
            ENGINE_START_TIMEOUT_S,
            "the generator's engine",
        )
        return {}

    def generate(self, groups: int) -> dict[str, Any]:
        """Leases `groups` groups and waits for them. Seconds count from the first lease to the last result checked."""
        self._until(self._room, COMMAND_TIMEOUT_S, "room at the generator")
        self.groups = self.rollouts = self.tokens = 0
        started = time.perf_counter()
        self.wanted_groups = groups
        self._grant()
        self._until(lambda: self.groups == groups, COMMAND_TIMEOUT_S, f"{groups} groups")
        return {"seconds": time.perf_counter() - started, "rollouts": self.rollouts, "tokens": self.tokens}

    def flow(self, on: bool, seconds: float = 0.0) -> dict[str, Any]:
        """Keeps the generator full from now on, or lets it run empty. Returns after `seconds`, or when it is empty."""
        if on:
            self.wanted_groups = 10**9
            self._grant()
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                self._pump(left)
        else:
            self.wanted_groups = 0
            self._until(lambda: not self.leases, COMMAND_TIMEOUT_S, "the last leases")
        return {}

    def sync(self) -> dict[str, Any]:
        """Brings the next version to the generator; leases go on. Durations in ms."""
        self.version += 1
        timeout_s, session = self.config.weights.timeout_s, self._session()
        self.weights.change()
        blocked_ms = self.weights.publish(self.version)
        started = time.perf_counter()
        ready = self._from_publisher(trainer_messages.SnapshotReady)
        offered = time.perf_counter()
        offer = messages.SyncOffer(RUN_EPOCH, self.version, 0, self._place(), ready.manifest, timeout_s)
        self._send(session, offer)
        self._to_publisher(trainer_messages.Broadcast(self.version, 0, GROUP_EPOCH, timeout_s))
        staged = self._sync_reply("stage")
        staged_ms = (time.perf_counter() - offered) * 1e3
        done = self._from_publisher(trainer_messages.BroadcastDone)
        self._to_publisher(trainer_messages.SnapshotWanted(ready.version))
        if done.error or staged.digests != [list(ready.manifest.digests)]:
            raise AsyncRLError(f"staged digests {staged.digests} are not {ready.manifest.digests} {done.error}")
        self._send(session, messages.SyncSwap(RUN_EPOCH, self.version, 0, ready.canary, timeout_s))
        swapped = self._sync_reply("swap")
        if len(swapped.in_use) != 1 or not swapped.in_use[0].compared or swapped.in_use[0].differing:
            raise AsyncRLError(f"bits in use of version {self.version}: {swapped.in_use}: figures would be worthless")
        diff, _ = canary_differences(ready.canary_logprobs, swapped.canary_logprobs)
        if not diff <= CANARY_TOLERANCE:
            raise AsyncRLError(f"canary of version {self.version} differs by {diff:.3g}: figures would be worthless")
        self._send(session, messages.SyncCommit(RUN_EPOCH, self.version, 0))
        ended = time.perf_counter()
        return {
            **staged.timings_ms,
            **swapped.timings_ms,
            "blocked_ms": blocked_ms,
            "offer_ms": (offered - started) * 1e3,
            "staged_ms": staged_ms,
            "transfer_ms": done.transfer_ms,
            "total_ms": (ended - offered) * 1e3,
            "canary_diff": diff,
            "num_bytes": done.num_bytes,
        }

    def raw_join(self, port: int) -> dict[str, Any]:
        """Joins the plain torch.distributed group with the raw receiver."""
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
        return {}

    def raw_broadcast(self) -> dict[str, Any]:
        """The same bytes in one torch.distributed.broadcast, as the thread of a sync would do it; and one memory copy.

        receive_ms is the receiver's, from taking part to the last byte; as in a sync, the sender waits for it by then.
        """
        import torch
        import torch.distributed as dist

        flat = self.weights.flat
        result: dict[str, Any] = {}

        def send() -> None:
            dist.send(torch.zeros(1, dtype=torch.uint8), dst=1)
            dist.broadcast(flat, src=0)
            took_ms = torch.zeros(1, dtype=torch.float64)
            dist.recv(took_ms, src=1)
            result["receive_ms"] = took_ms.item()

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        self._until(lambda: result, self.config.weights.timeout_s, "the raw receiver", poll_s=0.001)
        other = torch.empty_like(flat)
        other.copy_(flat)  # the first touch of new memory is not part of a copy
        started = time.perf_counter()
        other.copy_(flat)
        result["memcpy_ms"] = (time.perf_counter() - started) * 1e3
        return result

    # -- the link --------------------------------------------------------------------------------------------------

    def _pump(self, timeout_s: float) -> list[Any]:
        """Waits up to `timeout_s`, handles what came, grants what there is room for. Returns what was readable."""
        ready = self.poller.wait(max(0.0, min(timeout_s, self.ack_due - time.monotonic())))
        if self.socket in ready:
            for peer, frame in self.socket.receive():
                self._handle(peer, frame)
            self._grant()
        if time.monotonic() >= self.ack_due:
            self._acknowledge(self._session())
        return ready

    def _handle(self, peer: bytes, frame: bytes) -> None:
        message, now = decode(frame, max_bytes=self.socket.max_frame_bytes), time.monotonic()
        if isinstance(message, FROM_PUBLISHER):
            self.publisher, self.published[type(message)] = peer, message
            return
        if isinstance(message, messages.Hello):
            admission = self.sessions.hello(peer, message, version=self.version, now=now)
            if admission.session is None:
                raise AsyncRLError(f"the generator does not fit: {admission.reply}")
            self.session = admission.session
            self._send(self.session, admission.reply)
            return
        session = self.sessions.of(peer, now)
        if session is None:
            return
        match message:
            case messages.Beat():
                session.on_beat(message, now)
                self._acknowledge(session)
            case messages.GroupResult():
                self._result(session, message, len(body_of(frame)))
            case messages.LeaseFailed():
                raise AsyncRLError(f"lease {message.ordinal} failed ({message.reason}): {message.detail}")
            case messages.SyncReply():
                self.replies.append(message)

    def _result(self, session: DeskSession, message: messages.GroupResult, num_bytes: int) -> None:
        if self.sessions.see(session, message.seq, num_bytes) is not Seen.NEW:
            return
        group, lease = result_to_group(message), self.leases.pop(message.ordinal)
        validate_group(
            group,
            vocab_size=self.vocab_size,
            prompt_token_ids=lease.prompt_token_ids,
            num_rollouts=lease.num_rollouts,
            max_new_tokens=lease.max_new_tokens,
            oldest_version=0,
            newest_version=self.version,
        )
        self.sessions.mark_durable(session, message.seq)
        self.ack_due = min(self.ack_due, time.monotonic() + DURABLE_AFTER_S)
        self.groups += 1
        self.rollouts += len(group.rollouts)
        self.tokens += group.num_tokens

    def _room(self) -> bool:
        beat = self.session and self.session.beat
        return bool(beat) and beat.held_version == self.version and beat.sequences_wanted > self.granted

    def _grant(self) -> None:
        sampling = self.config.sampling
        while self.wanted_groups and self._room():
            prompt = self.prompts.integers(FIRST_TOKEN, self.vocab_size, PROMPT_TOKENS).astype(TOKEN_DTYPE)
            lease = Lease(
                key=LeaseKey(LeaseKind.TRAIN, self.next_ordinal, 0),
                issued_version=self.version,
                deadline_s=LEASE_TIMEOUT_S,
                prompt_token_ids=prompt,
                payload=ANSWER,
                num_rollouts=sampling.group_size,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
            )
            self.leases[self.next_ordinal] = lease
            self.next_ordinal += 1
            self.wanted_groups -= 1
            self.granted += lease.num_rollouts
            self._send(self._session(), lease_to_grant(lease, RUN_EPOCH))

    def _sync_reply(self, phase: str) -> messages.SyncReply:
        self._until(lambda: bool(self.replies), self.config.weights.timeout_s + 2.0, f"the reply in phase {phase}")
        reply = self.replies.pop()
        if reply.error or reply.phase != phase:
            raise AsyncRLError(f"sync failed in phase {reply.phase} (wanted {phase}): {reply.error}")
        return reply

    def _from_publisher(self, kind: type[_M]) -> _M:
        """Its next message of this type."""
        self._until(lambda: kind in self.published, self.config.weights.timeout_s + 2.0, f"the publisher's {kind}")
        return self.published.pop(kind)

    def _to_publisher(self, message: Message) -> None:
        assert self.publisher is not None
        self.socket.send_message(self.publisher, message)

    def _place(self) -> ChannelPlace:
        """The generator's place in the weight channel, which is opened when it is needed first."""
        if self.weights.place is None:
            timeout_s = self.config.weights.timeout_s
            self._to_publisher(trainer_messages.OpenChannel(GROUP_EPOCH, "benchmark/1", 2, timeout_s))
            ready = self._from_publisher(trainer_messages.ChannelReady)
            if ready.error:
                raise AsyncRLError(ready.error)
            self.weights.place = ChannelPlace(GROUP_EPOCH, ready.host, ready.port, "benchmark/1", 1, 2, ready.backend)
        return self.weights.place

    def _until(self, condition: Callable[[], Any], timeout_s: float, what: str, *, poll_s: float = POLL_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AsyncRLError(f"{what}: nothing within {timeout_s:.0f} s")
            self._pump(min(left, poll_s))

    def _session(self) -> DeskSession:
        if self.session is None:
            raise AsyncRLError("no generator is connected")
        return self.session

    def _acknowledge(self, session: DeskSession) -> None:
        """Best effort, as at the real desk: a later one repairs it, and a generator may just be reconnecting."""
        self.ack_due = math.inf
        if session.peer is not None:
            self.socket.send_message(session.peer, self.sessions.ack(session))

    def _send(self, session: DeskSession, message: Message) -> None:
        frame = encode(message, max_bytes=self.socket.max_frame_bytes)
        if session.peer is None or not self.socket.send(session.peer, frame):
            raise AsyncRLError(f"{type(message).__name__} could not be sent")

    @staticmethod
    def _answer(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)


class Versions:
    """The trainer's part: a policy whose weights change, and the publisher."""

    def __init__(self, config: Config, address: str) -> None:
        import torch

        from asyncrl.trainer.engines.policy import Policy
        from asyncrl.weights.bytes.snapshot import SnapshotBuffer
        from asyncrl.weights.publisher import Publisher

        torch.set_num_threads(1)
        policy = Policy.load(config.model.path, dtype=config.model.dtype)
        self.parameters = policy.trainable_parameters()
        buffer = SnapshotBuffer(policy.sync_source().named, config.weights.bucket_bytes)
        self.flat = buffer.flat.clone()  # of the same size, for what is measured beside
        self.canary = policy.sample_sequences(CANARY_SEQUENCES, CANARY_LENGTH, 0)
        self.policy = policy
        self.publisher = Publisher(address, buffer, self.canary, host="127.0.0.1")
        self.publisher.start()
        self.place: ChannelPlace | None = None  # of the generator in the weight channel
        self.noise = torch.Generator().manual_seed(0)

    def publish(self, version: int) -> float:
        """The milliseconds for which a trainer would have been held up."""
        started = time.monotonic()
        self.publisher.publish(version, self.policy.score(self.canary))
        return (time.monotonic() - started) * 1e3

    def change(self) -> None:
        """By about as much as an optimizer step: every version has digests of its own."""
        import torch

        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=self.noise), alpha=1e-5)


class LearnerPeer:
    """The peer's process, seen from the generator's event loop."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.address = ""

    @classmethod
    async def start(cls, config_file: Path, cpu: int) -> LearnerPeer:
        """Returns when it listens at `address`."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.speed.learner_peer", str(config_file), str(cpu),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        peer = cls(process)
        peer.address = (await peer._read("start"))["address"]
        return peer

    async def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """The answer to one command. Raises AsyncRLError when the peer ends or stays silent."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
        return await self._read(do)

    async def close(self) -> None:
        """Ends the process."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _read(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            line = await self._process.stdout.readline()
        if not line:
            raise AsyncRLError(f"the learner's end of the benchmark ended during {what!r}; its error is above")
        return json.loads(line)


def main() -> None:
    from asyncrl.host.processes import die_with_parent
    from benchmarks.common import pin

    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        print("a part of benchmarks: python -m benchmarks.speed.learner_peer CONFIG CPU < COMMANDS", file=sys.stderr)
        sys.exit(2)
    die_with_parent()
    config_file, cpu = sys.argv[1:]
    pin(int(cpu))
    peer = Peer(load_config(config_file, []))
    peer.serve()
    # Threads of gloo may still wait for a partner that is gone.
    os._exit(0)


if __name__ == "__main__":
    main()

"""The rollout link without a model: encoding, sockets, journal, each beside its floor.

    python -m benchmarks.speed.transport [--quick]

encoding  a group to a frame and back, checked, against the same arrays as lists in msgpack and JSON (which check
          nothing), and against copying its bytes twice
sockets   frames through ClientSocket and ServerSocket, encrypted (CURVE) as between hosts, against bare pyzmq sockets
          with the same options; then messages and tokens per second that are decoded and checked, all on one core
journal   append and sync against write and fdatasync of the same bytes in the same pieces
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from asyncrl.host.addresses import parse_address
from asyncrl.host.processes import die_with_parent
from asyncrl.link.codec import decode, encode, encode_body
from asyncrl.link.curve_keys import ClientAuth, ServerAuth
from asyncrl.link.messages import ActiveLease, Beat, GroupResult
from asyncrl.link.rollouts import group_to_result, result_to_group, validate_group
from asyncrl.link.socket_options import set_options
from asyncrl.link.sockets import ClientSocket, ServerSocket
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StoredGroup
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE, FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan
from benchmarks import common

VOCAB = 150_000
ROLLOUTS, TOKENS = 8, 2_048
PROMPT_TOKENS = 128
MAX_FRAME_BYTES = 64 * 2**20
ALLOWED = frozenset({GroupResult, Beat})
RECEIVE_TIMEOUT_S = 20.0


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one side of one pair")
    options = common.parse(parser)
    if options.quick:
        options.seconds = 0.1
    options.learner_cpu, options.generator_cpu = common.cpus()
    common.pin(options.learner_cpu)
    report = common.Report("transport", options)
    measure_encoding(report, options)
    for tokens, name in ((256, "frames of 17 kB (8 x 256 tokens)"), (16_384, "frames of 1 MB (8 x 16,384 tokens)")):
        frame = encode(group_to_result(group_of(ROLLOUTS, tokens), 7, 1), max_bytes=MAX_FRAME_BYTES)
        measure_sockets(report, options, frame, name)
    measure_ingress(report, options)
    for group_commit in (1, 32):
        measure_journal(report, options, group_of(8, 256), group_commit)
    report.finish()
    return 0


def group_of(rollouts: int, tokens: int, seed: int = 0) -> Group:
    """A group with plausible contents."""
    random = np.random.default_rng(seed)
    return Group(
        LeaseKey(LeaseKind.TRAIN, 12_345, 0),
        random.integers(0, VOCAB, PROMPT_TOKENS).astype(TOKEN_DTYPE),
        [
            Rollout(
                token_ids=random.integers(0, VOCAB, tokens).astype(TOKEN_DTYPE),
                behaviour_logprobs=-random.exponential(1.0, tokens).astype(LOGPROB_DTYPE),
                version_spans=(VersionSpan(0, tokens // 2, 41), VersionSpan(tokens // 2, tokens, 42)),
                finish_reason=FinishReason.STOP,
                reward=1.0,
                reward_parts={"exact": 1.0},
            )
            for _ in range(rollouts)
        ],
    )


# -- encoding ----------------------------------------------------------------------------------------------------------


def measure_encoding(report: common.Report, options: Any) -> None:
    """One group, from arrays to arrays."""
    group = group_of(ROLLOUTS, TOKENS)
    fields = _as_lists(group)

    def asyncrl() -> Group:
        frame = encode(group_to_result(group, 7, 1), max_bytes=MAX_FRAME_BYTES)
        return result_to_group(_decoded(frame))

    def copies() -> None:
        for _ in range(2):
            for rollout in group.rollouts:
                np.copy(rollout.token_ids)
                np.copy(rollout.behaviour_logprobs)

    def in_msgpack() -> list[Any]:
        return _as_arrays(msgpack.unpackb(msgpack.packb(_as_lists(group))))

    def in_json() -> list[Any]:
        return _as_arrays(json.loads(json.dumps(_as_lists(group))))

    peers: list[tuple[str, Callable[[], Any], str]] = [
        ("lists in msgpack", in_msgpack, "<= 0.02"),
        ("lists in JSON", in_json, "<= 0.002"),
        ("lists in msgpack that stay lists", lambda: msgpack.unpackb(msgpack.packb(fields)), ""),
        ("two copies of its bytes", copies, ""),
    ]
    for name, other, bar in peers:
        _compare(report, options, "encode, decode, check types", asyncrl, name, other, bar)
    decoded = asyncrl()
    _compare(report, options, "validate", lambda: _validate(decoded, group), "two copies of its bytes", copies, "")


def _compare(
    report: common.Report,
    options: Any,
    what: str,
    ours: Callable[[], Any],
    name: str,
    other: Callable[[], Any],
    bar: str,
) -> None:
    times: dict[Callable[[], Any], list[float]] = {ours: [], other: []}
    report.begin()
    for _ in range(options.pairs):
        for work in (ours, other):
            with common.watch() as watch:
                times[work].append(_ns_per_call(work, options.seconds) / (ROLLOUTS * TOKENS))
            report.watched(watch)
    report.pairs(what, "ns/token", times[ours], times[other], name, bar)


def _decoded(frame: bytes) -> GroupResult:
    message = decode(frame, max_bytes=MAX_FRAME_BYTES, allowed=ALLOWED)
    assert isinstance(message, GroupResult)
    return message


def _validate(group: Group, sent: Group) -> None:
    validate_group(
        group, vocab_size=VOCAB, prompt_token_ids=sent.prompt_token_ids, num_rollouts=len(sent.rollouts),
        max_new_tokens=sent.rollouts[0].num_tokens, oldest_version=40, newest_version=42,
    )  # fmt: skip


def _as_lists(group: Group) -> dict[str, Any]:
    return {
        "seq": 7, "run_epoch": 1, "kind": group.key.kind.value, "ordinal": group.key.ordinal, "attempt": 0,
        "prompt": group.prompt_token_ids.tolist(),
        "rollouts": [
            {
                "tokens": rollout.token_ids.tolist(),
                "logprobs": rollout.behaviour_logprobs.tolist(),
                "spans": [[span.start, span.stop, span.version] for span in rollout.version_spans],
                "finish": rollout.finish_reason.value, "reward": rollout.reward, "parts": rollout.reward_parts,
            }
            for rollout in group.rollouts
        ],
    }  # fmt: skip


def _as_arrays(fields: dict[str, Any]) -> list[Any]:
    return [
        (np.array(rollout["tokens"], TOKEN_DTYPE), np.array(rollout["logprobs"], LOGPROB_DTYPE))
        for rollout in fields["rollouts"]
    ]


def _ns_per_call(work: Callable[[], Any], seconds: float) -> float:
    """By CPU time: nothing here waits, and others may have the CPU meanwhile."""
    work()
    calls, started = 0, time.thread_time()
    while (elapsed := time.thread_time() - started) < seconds:
        work()
        calls += 1
    return elapsed / calls * 1e9


# -- sockets -----------------------------------------------------------------------------------------------------------


def beat_of(num_leases: int) -> Beat:
    """What a generator with so many leases sends most often."""
    active = [ActiveLease(LeaseKind.TRAIN, 12_345 + number, 0, 41) for number in range(num_leases)]
    tickets = [bytes([number]) * 16 for number in range(num_leases)]
    return Beat(1, 512, active, 10**6, 10**4, 0, 900.0, 100.0, 0, 41, 0, True, 400, tickets)


def measure_sockets(report: common.Report, options: Any, frame: bytes, name: str) -> None:
    """Frames per second into this process, from a sender on the other CPU that never pauses."""
    rates: dict[str, list[float]] = {"asyncrl": [], "raw": []}
    report.begin()
    for pair in range(options.pairs):
        for side in ("asyncrl", "raw") if pair % 2 == 0 else ("raw", "asyncrl"):
            with common.watch() as watch, Receiver(side, frame, options) as receiver:
                rates[side].append(_count_frames(receiver.receive, options.seconds))
            report.watched(watch)
    report.pairs(f"socket, {name}", "frames/s", rates["asyncrl"], rates["raw"], "bare pyzmq", ">= 0.8")
    report.figure(f"socket, {name}", "GB/s", [rate * len(frame) / 1e9 for rate in rates["asyncrl"]])


def measure_ingress(report: common.Report, options: Any) -> None:
    """Messages that are received, decoded and checked in a second, by one core with all of its threads."""
    beat = encode(beat_of(8), max_bytes=MAX_FRAME_BYTES)
    sent = group_of(ROLLOUTS, TOKENS)
    group = encode(group_to_result(sent, 7, 1), max_bytes=MAX_FRAME_BYTES)

    def take_beat(frame: bytes) -> None:
        decode(frame, max_bytes=MAX_FRAME_BYTES, allowed=ALLOWED)

    def take_group(frame: bytes) -> None:
        _validate(result_to_group(_decoded(frame)), sent)

    for frame, take, what, unit, each, bar in (
        (beat, take_beat, "beats of 8 leases, received and checked", "messages/s", 1, ">= 20000"),
        (group, take_group, "groups, received and checked", "tokens/s", ROLLOUTS * TOKENS, ">= 4e7"),
    ):
        found: list[float] = []
        report.begin()
        for _ in range(options.pairs):
            with common.watch() as watch, Receiver("asyncrl", frame, options) as receiver:
                found.append(_count_frames(lambda take=take: receiver.receive(take), options.seconds) * each)  # type: ignore[misc]
            report.watched(watch)
        report.figure(what, unit, found, bar)


class Receiver:
    """A ROUTER in this process, asyncrl's or a bare one, and a sender of one frame on the other CPU."""

    def __init__(self, side: str, frame: bytes, options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        public, secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        (folder / "allowed").write_bytes(client_public + b"\n")
        (folder / "frame").write_bytes(frame)
        if side == "asyncrl":
            auth = ServerAuth(secret, folder / "allowed")
            self._server = ServerSocket("tcp://127.0.0.1:0", max_frame_bytes=MAX_FRAME_BYTES, auth=auth)
            address, self._close, self.receive = self._server.address, self._server.close, self._receive
        else:
            self._context = zmq.Context()
            self._bare = self._context.socket(zmq.ROUTER)
            set_options(self._bare, parse_address("tcp://127.0.0.1:0"), MAX_FRAME_BYTES)
            self._bare.set(zmq.CURVE_SERVER, 1)
            self._bare.set(zmq.CURVE_SECRETKEY, secret)
            self._bare.bind("tcp://127.0.0.1:0")
            address = self._bare.get(zmq.LAST_ENDPOINT).decode().rstrip("\0")  # type: ignore[union-attr]
            self._close, self.receive = lambda: self._context.destroy(linger=0), self._receive_bare
        spec = [side, address, public.decode(), client_secret.decode(), str(folder / "frame")]
        command = [sys.executable, "-m", "benchmarks.speed.transport", "--sender", *spec, str(options.generator_cpu)]
        self._sender = subprocess.Popen(command)

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.kill()
        self._sender.wait()
        self._close()
        self._folder.cleanup()

    def _receive(self, take: Callable[[bytes], object] | None = None) -> int:
        frames = self._server.poll(RECEIVE_TIMEOUT_S)
        if take is not None:
            for _, frame in frames:
                take(frame)
        return len(frames)

    def _receive_bare(self, take: object = None) -> int:
        if not self._bare.poll(round(RECEIVE_TIMEOUT_S * 1000)):
            return 0
        self._bare.recv_multipart(zmq.NOBLOCK)
        return 1


def _count_frames(receive: Callable[[], int], seconds: float) -> float:
    if not receive():
        raise TimeoutError(f"no frame within {RECEIVE_TIMEOUT_S:g} s: the sender did not start; its error is above")
    warm_until = time.perf_counter() + seconds / 5
    while time.perf_counter() < warm_until:
        receive()
    frames, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        frames += receive()
    return frames / elapsed


def _send_forever(side: str, address: str, server_key: str, secret: str, path: str, cpu: str) -> None:
    """The sender's process: ends with its parent, or by its kill."""
    die_with_parent()
    common.pin(int(cpu))
    frame = Path(path).read_bytes()
    if side == "asyncrl":
        auth = ClientAuth(secret.encode(), server_key.encode())
        client = ClientSocket(address, max_frame_bytes=MAX_FRAME_BYTES, auth=auth)
        while True:
            client.send(frame)
    context = zmq.Context()
    bare = context.socket(zmq.DEALER)
    set_options(bare, parse_address(address), MAX_FRAME_BYTES)
    bare.set(zmq.CURVE_SERVERKEY, server_key.encode())
    bare.set(zmq.CURVE_SECRETKEY, secret.encode())
    bare.set(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret.encode()))
    bare.connect(address)
    while True:
        bare.send(frame, copy=len(frame) < 65_536)


# -- journal -----------------------------------------------------------------------------------------------------------


def measure_journal(report: common.Report, options: Any, group: Group, group_commit: int) -> None:
    """Groups appended and synced, `group_commit` of them at a time, on the file system of the results folder."""
    body = encode_body(group_to_result(group, 7, 1))
    ours: list[float] = []
    raw: list[float] = []
    report.begin()
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.results) as folder:
        for pair in range(options.pairs):
            for side in ("asyncrl", "raw") if pair % 2 == 0 else ("raw", "asyncrl"):
                place = Path(folder) / f"{side}{pair}"
                with common.watch() as watch:
                    if side == "asyncrl":
                        ours.append(_journal_mb_per_s(place, group, body, group_commit, options.seconds))
                    else:
                        raw.append(_write_mb_per_s(place, body * group_commit, options.seconds))
                report.watched(watch)
    what = f"journal, a sync every {group_commit} groups of {len(body) // 1000} kB"
    report.pairs(what, "MB/s", ours, raw, "write + fdatasync")


def _journal_mb_per_s(folder: Path, group: Group, body: bytes, group_commit: int, seconds: float) -> float:
    journal = Journal.open(folder)
    lengths = tuple(rollout.num_tokens for rollout in group.rollouts)
    sequence, started = itertools.count(1), time.perf_counter()
    written = 0
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(group_commit):
            seq = next(sequence)
            journal.append(StoredGroup("generator", 1, seq, seq, 0, 41, 41, 42, lengths, body), time.monotonic())
            written += len(body)
        journal.make_durable()
    journal.close()
    return written / elapsed / 1e6


def _write_mb_per_s(path: Path, piece: bytes, seconds: float) -> float:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    written, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        written += os.write(fd, piece)
        os.fdatasync(fd)
    os.close(fd)
    return written / elapsed / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sender"]:
        _send_forever(*sys.argv[2:])
    sys.exit(main())

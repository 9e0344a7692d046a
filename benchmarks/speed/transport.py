"""The rollout link without a model: encoding, sockets, journal, each beside its floor.

    python -m benchmarks.speed.transport [--quick]

encoding  one rollout to a frame and back, checked and validated, against the same fields as lists in msgpack
          and JSON (which check nothing), and against copying its bytes twice
sockets   frames through ClientSocket and ServerSocket against bare pyzmq sockets with the same options
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
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import group_to_result, result_to_group, validate_group
from asyncrl.link.socket_options import set_options
from asyncrl.link.sockets import ClientSocket, ServerSocket
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StoredGroup
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE, FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan
from benchmarks import common

VOCAB = 150_000
TOKENS = 2_048
PROMPT_TOKENS = 128
MAX_FRAME_BYTES = 64 * 2**20
ALLOWED = frozenset({GroupResult})
RECEIVE_TIMEOUT_S = 20.0


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one side of one pair")
    options = common.parse(parser)
    if options.quick:
        options.seconds = 0.1
    options.learner_cpu, options.generator_cpu = common.cpus()
    common.pin(options.learner_cpu)
    report = common.Report("transport", options)
    measure_encoding(report, options)
    for tokens, name in ((256, "frames of 17 kB (8 x 256 tokens)"), (16_384, "frames of 1 MB (8 x 16,384 tokens)")):
        measure_sockets(report, options, group_of(8, tokens), name)
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
    """One rollout of 2,048 tokens, there and back."""
    group = group_of(1, TOKENS)
    fields = _as_lists(group)

    def asyncrl() -> None:
        frame = encode(group_to_result(group, 7, 1), max_bytes=MAX_FRAME_BYTES)
        message = decode(frame, max_bytes=MAX_FRAME_BYTES, allowed=ALLOWED)
        validate_group(
            result_to_group(message), vocab_size=VOCAB, prompt_token_ids=group.prompt_token_ids, num_rollouts=1,
            max_new_tokens=TOKENS, oldest_version=40, newest_version=42,
        )  # fmt: skip

    def copies() -> None:
        for _ in range(2):
            np.copy(group.rollouts[0].token_ids)
            np.copy(group.rollouts[0].behaviour_logprobs)

    others: dict[str, Callable[[], Any]] = {
        "lists in msgpack": lambda: msgpack.unpackb(msgpack.packb(fields)),
        "lists in JSON": lambda: json.loads(json.dumps(fields)),
        "two copies of its bytes": copies,
    }
    for name, other in others.items():
        ours, theirs = [], []
        report.begin()
        for _ in range(options.pairs):
            for work, times in ((asyncrl, ours), (other, theirs)):
                with common.watch() as watch:
                    times.append(_ns_per_call(work, options.seconds) / TOKENS)
                report.watched(watch)
        bar = "<= 1/50" if "copies" not in name else "the floor"
        report.pairs("encode, decode, validate", "ns/token", ours, theirs, name, bar)


def _as_lists(group: Group) -> dict[str, Any]:
    (rollout,) = group.rollouts
    return {
        "seq": 7, "run_epoch": 1, "kind": group.key.kind.value, "ordinal": group.key.ordinal, "attempt": 0,
        "prompt": group.prompt_token_ids.tolist(),
        "tokens": rollout.token_ids.tolist(),
        "logprobs": rollout.behaviour_logprobs.tolist(),
        "spans": [[span.start, span.stop, span.version] for span in rollout.version_spans],
        "finish": rollout.finish_reason.value, "reward": rollout.reward, "parts": rollout.reward_parts,
    }  # fmt: skip


def _ns_per_call(work: Callable[[], Any], seconds: float) -> float:
    work()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(10):
            work()
        calls += 10
    return elapsed / calls * 1e9


# -- sockets -----------------------------------------------------------------------------------------------------------


def measure_sockets(report: common.Report, options: Any, group: Group, name: str) -> None:
    """Frames per second into this process, from a sender on the other CPU that never pauses."""
    frame = encode(group_to_result(group, 7, 1), max_bytes=MAX_FRAME_BYTES)
    ours: list[float] = []
    raw: list[float] = []
    report.begin()
    for pair in range(options.pairs):
        for side in ("asyncrl", "raw") if pair % 2 == 0 else ("raw", "asyncrl"):
            with common.watch() as watch:
                rate = _frames_per_s(side, frame, options)
            report.watched(watch)
            (ours if side == "asyncrl" else raw).append(rate)
    report.pairs(f"socket, {name}", "frames/s", ours, raw, "bare pyzmq", ">= 0.8")
    report.figure(f"socket, {name}", "GB/s", [rate * len(frame) / 1e9 for rate in ours])


def _frames_per_s(side: str, frame: bytes, options: Any) -> float:
    if side == "asyncrl":
        server = ServerSocket("tcp://127.0.0.1:0", max_frame_bytes=MAX_FRAME_BYTES)
        address, close = server.address, server.close

        def receive() -> int:
            return len(server.poll(RECEIVE_TIMEOUT_S))
    else:
        context = zmq.Context()
        bare = context.socket(zmq.ROUTER)
        set_options(bare, parse_address("tcp://127.0.0.1:0"), MAX_FRAME_BYTES)
        bare.bind("tcp://127.0.0.1:0")
        address = bare.get(zmq.LAST_ENDPOINT).decode().rstrip("\0")

        def close() -> None:
            context.destroy(linger=0)

        def receive() -> int:
            if not bare.poll(round(RECEIVE_TIMEOUT_S * 1000)):
                return 0
            bare.recv_multipart(zmq.NOBLOCK)
            return 1

    arguments = [side, address, str(len(frame)), str(options.generator_cpu)]
    sender = subprocess.Popen([sys.executable, "-m", "benchmarks.speed.transport", "--sender", *arguments])
    try:
        return _count_frames(receive, options.seconds)
    finally:
        sender.kill()
        sender.wait()
        close()


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


def _send_forever(side: str, address: str, size: str, cpu: str) -> None:
    """The sender's process: ends with its parent, or by its kill."""
    die_with_parent()
    common.pin(int(cpu))
    frame = bytes(int(size))
    if side == "asyncrl":
        client = ClientSocket(address, max_frame_bytes=MAX_FRAME_BYTES)
        while True:
            client.send(frame)
    context = zmq.Context()
    bare = context.socket(zmq.DEALER)
    set_options(bare, parse_address(address), MAX_FRAME_BYTES)
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

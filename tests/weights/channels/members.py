"""Receivers of weight channels as processes of their own, which report every broadcast and can be told to fail."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from asyncrl.link.field_checks import to_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.channel import WeightChannel
from tests.warm_processes import WarmProcess

MEMBER = """
import json, os, signal, sys, time
import torch
from asyncrl.errors import ChannelError
from asyncrl.link.field_checks import from_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.link.weight_records import ChannelSpec

def say(**values):
    print(json.dumps(values), flush=True)

spec, num_bytes, timeout_s, faults = [json.loads(argument) for argument in sys.argv[1:]]
say(pid=os.getpid())
started = time.monotonic()
try:
    channel = WeightChannel(from_plain(ChannelSpec, spec))
    channel.join()
    say(joined=True)
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    for bucket in range(10**6):
        if str(bucket) in faults:
            os.kill(os.getpid(), getattr(signal, faults[str(bucket)]))
        started = time.monotonic()
        channel.broadcast([flat], timeout_s)
        say(bucket=bucket, digest=digest(flat))
except ChannelError as error:
    say(error=str(error), elapsed_s=time.monotonic() - started)
channel.close()
"""


class Member:
    """One receiver. It takes buckets of `num_bytes` until something fails."""

    def __init__(self, spec: Any, *, num_bytes: int, timeout_s: float, faults: dict[int, str] | None = None) -> None:
        arguments = [json.dumps(v) for v in (to_plain(spec), num_bytes, timeout_s, faults or {})]
        self.process = WarmProcess(
            [sys.executable, "-c", MEMBER, *arguments],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    def report(self) -> dict[str, Any]:
        """The next line; fails when the process has ended."""
        line = self.process.stdout.readline()
        assert line, f"the member ended with {self.process.wait()}"
        return json.loads(line)

    def error(self) -> dict[str, Any]:
        """The report of its failure, whatever comes before."""
        while "error" not in (report := self.report()):
            pass
        return report

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def members_of(channel: Any, **options: Any) -> list[Member]:
    """A process for every rank but 0."""
    faults = options.pop("faults", {})
    return [
        Member(channel.spec.for_rank(rank), faults=faults.get(rank), **options)
        for rank in range(1, channel.spec.world_size)
    ]


def in_threads(*calls: Any, timeout_s: float = 20.0) -> None:
    """Runs calls at the same time; all must return."""
    failures: list[BaseException] = []

    def guarded(call: Any) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), "a call did not return"
    if failures:
        raise failures[0]


def pair(spec: ChannelSpec, **options: Any) -> tuple[WeightChannel, WeightChannel]:
    """Rank 0 and rank 1 of a channel of two, both in this process, joined. `options` are those of `WeightChannel`."""
    root = WeightChannel.host(dataclasses.replace(spec, world_size=2), **options)
    member = WeightChannel(root.spec.for_rank(1), **options)
    in_threads(root.join, member.join)
    return root, member

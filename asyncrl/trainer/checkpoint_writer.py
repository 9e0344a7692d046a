"""Saves checkpoints beside training: the training thread pays for a copy into host memory, a thread does the rest.

    training thread   copy of the state ──▶ next step ──▶ ...                        ──▶ `finished`: tell the desk
    writer thread            └──▶ files, hashed on their way ──▶ MANIFEST ──▶ rename ──▶ latest

A thread and not a process: writing and hashing let go of the GIL, and a process would need the copies in shared memory
and a second import of torch. One checkpoint at a time: the copies are kept and used again, memory does not grow.

With several ranks each copies and writes what it holds, and rank 0 does what concerns the folder:

    rank 0     folder, marker ──▶ its name ──▶ own files ──▶ proofs of all ──▶ MANIFEST, rename
    others                         └──▶ sees the marker? ──▶ own files ──▶ proofs (or what went wrong) ──┘

They speak over a process group of their own, since training uses the others meanwhile; messages are JSON.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoint_files import write_checkpoint
from asyncrl.storage.tensor_files import FileProof
from asyncrl.trainer.checkpoint_state import CopiedState, copy_state, write_state
from asyncrl.trainer.engines.base import PolicyEngine
from asyncrl.trainer.engines.shards import HostCopies
from asyncrl.trainer.step import StepRunner

log = logging.getLogger(__name__)

# Until a file of rank 0 must be seen by another rank: file systems of several hosts cache folders.
SHARE_TIMEOUT_S = 30.0
LOOK_AGAIN_S = 0.1
MARKER = "shared.marker"


class CheckpointPeers:
    """The ranks that write a checkpoint together. Every wait ends with the time limit of the process group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group` is a gloo group of all ranks that nobody else uses; None: there is one rank."""
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def tell(self, message: Any) -> Any:
        """What rank 0 gave, JSON values, at every rank."""
        return message if self._group is None else self.gather(message if self.rank == 0 else None)[0]

    def gather(self, message: Any) -> list[Any]:
        """What each rank gave, JSON values, at every rank."""
        if self._group is None:
            return [message]
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, torch.nn.functional.pad(data, (0, longest - data.numel())), group=self._group)
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(padded, sizes, strict=True)]


SOLO = CheckpointPeers()


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """How a checkpoint ended. `error` is empty if it is durable at `path`."""

    version: int
    path: str
    error: str
    seconds: float  # since it was begun
    blocked_s: float  # of these, what the training thread waited


class CheckpointWriter:
    """Saves the state of a `StepRunner`, one checkpoint at a time. All ranks begin the same ones."""

    def __init__(self, root: Path, runner: StepRunner, *, keep: int, peers: CheckpointPeers = SOLO) -> None:
        self._root = root
        self._runner = runner
        self._keep = keep
        self._peers = peers
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._saved: SavedCheckpoint | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written, or `finished` was not asked for it since."""
        return self._thread is not None

    def begin(self, *, run_epoch: int, desk_state: bytes = b"") -> None:
        """Copies the state and begins to write it; training may go on at once. Not while `is_busy`."""
        if self._peers.rank != 0:
            # Rank 0 has the proofs of all ranks, so that this one has only to end; it begins when it is told.
            self.finished(SHARE_TIMEOUT_S)
        assert not self.is_busy, "one checkpoint at a time"
        started = time.monotonic()
        replicas = self._runner.world.num_replicas
        state = copy_state(self._runner.state(), self._copies, self._peers.rank, self._peers.size, replicas)
        blocked_s = time.monotonic() - started
        job = _Job(self._root, self._keep, self._peers, self._runner.engines.actor, state, run_epoch, desk_state)

        def write() -> None:
            path, error = "", ""
            try:
                self._copies.wait()
                path = str(job.run() or "")
            except Exception as failure:  # noqa: BLE001  # whatever it is, training goes on and people are told
                error = str(failure) or repr(failure)
            self._saved = SavedCheckpoint(state.version, path, error, time.monotonic() - started, blocked_s)

        # A daemon: a trainer that fails must not stay for its checkpoint, which readers will not look at.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def finished(self, timeout_s: float = 0.0) -> SavedCheckpoint | None:
        """How the checkpoint that was begun ended, once; None while it is being written, or without one."""
        if self._thread is None:
            return None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        self._thread = None
        saved, self._saved = self._saved, None
        assert saved is not None, "the thread leaves what became of it"
        return saved

    @property
    def host_bytes(self) -> int:
        """Host memory that the copies take."""
        return self._copies.num_bytes


@dataclass(frozen=True, slots=True)
class _Job:
    """One checkpoint, as one rank writes it."""

    root: Path
    keep: int
    peers: CheckpointPeers
    actor: PolicyEngine
    state: CopiedState
    run_epoch: int
    desk_state: bytes

    def run(self) -> Path | None:
        """Returns the folder at rank 0. Raises CheckpointError at rank 0; at others, which report to it, nothing."""
        if self.peers.rank != 0:
            self._follow()
            return None
        total = sum(self.peers.gather(self._expected_bytes()))
        told = False

        def write_files(folder: Path) -> dict[str, FileProof]:
            nonlocal told
            told = True
            return self._lead(folder)

        try:
            manifest = write_checkpoint(
                self.root,
                self.state.version,
                write_files,
                run_epoch=self.run_epoch,
                desk_state=self.desk_state,
                extra={**_as_json(self.actor), "torch": torch.__version__, "ranks": self.peers.size},
                keep=self.keep,
                expected_bytes=total,
            )
        finally:
            if not told:
                self.peers.tell(None)  # the others wait for a folder
        return manifest.path

    def _lead(self, folder: Path) -> dict[str, FileProof]:
        token = uuid.uuid4().hex
        if self.peers.size == 1:
            return write_state(self.state, self.actor, folder)
        problem = _said(lambda: (folder / MARKER).write_text(token, encoding="utf-8"))
        self.peers.tell([str(folder.resolve()), token])
        proofs: dict[str, FileProof] = {}
        problem = problem or _said(lambda: proofs.update(write_state(self.state, self.actor, folder)))
        answers = self.peers.gather({"problem": problem, "proofs": proofs})
        for rank, answer in enumerate(answers):
            if answer["problem"]:
                raise CheckpointError(f"rank {rank} could not write its part: {answer['problem']}")
            proofs |= {name: (int(size), str(sha)) for name, (size, sha) in answer["proofs"].items()}
        (folder / MARKER).unlink()
        return proofs

    def _follow(self) -> None:
        self.peers.gather(self._expected_bytes())
        if (told := self.peers.tell(None)) is None:
            return  # rank 0 says why
        folder, token = Path(told[0]), told[1]
        proofs: dict[str, FileProof] = {}
        problem = _said(lambda: _require_marker(folder / MARKER, token))
        problem = problem or _said(lambda: proofs.update(write_state(self.state, self.actor, folder)))
        self.peers.gather({"problem": problem, "proofs": proofs})

    def _expected_bytes(self) -> int:
        """What this rank writes, about: of rank 0 the model beside what is copied."""
        own = self.state.num_bytes
        if self.peers.size > 1:
            return own
        return own + self.actor.saved_bytes()


def _said(action: Callable[[], object]) -> str:
    """Does it; returns what went wrong, in words, or nothing."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  # of whatever class: rank 0 must be told, or it would wait
        return f"{type(error).__name__}: {error}"
    return ""


def _require_marker(marker: Path, token: str) -> None:
    """Waits until this rank sees what rank 0 wrote. Raises CheckpointError when it does not."""
    deadline = time.monotonic() + SHARE_TIMEOUT_S
    while True:
        try:
            if marker.read_text(encoding="utf-8") == token:
                return
        except OSError:
            pass  # not there yet, or not here at all
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{marker} of rank 0 cannot be seen here after {SHARE_TIMEOUT_S:.0f} s: all ranks write into one "
                "folder; put run.dir on a file system that all hosts of the learner share"
            )
        time.sleep(LOOK_AGAIN_S)


def _as_json(actor: PolicyEngine) -> dict[str, str]:
    identity = actor.identity()
    return {"architecture": identity.architecture, "update": identity.update, "frozen": identity.frozen}

"""Weights & Biases as a sink of metrics. It may fail, be slow or be absent: training does not notice."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from asyncrl.metrics.types import AnyMetrics, to_record

log = logging.getLogger(__name__)

WANDB_QUEUE = 1000


class WandbSink:
    """Sends records from a thread of its own: importing wandb, starting it and the network take seconds.

    `online` without a key becomes `offline`; there is never a prompt. When the queue is full, records are
    counted and left out (metrics.jsonl has them all).
    """

    def __init__(
        self,
        mode: str,
        project: str,
        name: str,
        folder: Path,
        config: dict[str, Any],
        close_timeout_s: float = 10.0,
    ) -> None:
        assert mode in ("offline", "online"), mode
        if mode == "online" and not has_wandb_key():
            log.warning("no Weights & Biases key found (WANDB_API_KEY or ~/.netrc); logging offline, see `wandb sync`")
            mode = "offline"
        self.mode = mode
        self.failed = False
        self._left_out = 0
        self._close_timeout_s = close_timeout_s
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=WANDB_QUEUE)
        # `id` is kept, so that a restarted learner goes on in the same wandb run.
        settings = {
            "project": project,
            "name": name,
            "id": _kept_id(folder),
            "dir": str(folder),
            "config": config,
        }
        self._thread = threading.Thread(target=self._work, args=(settings,), name="wandb", daemon=True)
        self._thread.start()

    def write(self, metrics: AnyMetrics) -> None:
        if self.failed:
            return
        try:
            self._queue.put_nowait(flat_record(metrics))
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Waits for what is queued, at most close_timeout_s."""
        deadline = time.monotonic() + self._close_timeout_s
        try:
            self._queue.put(None, timeout=self._close_timeout_s)
        except queue.Full:
            self._left_out += self._queue.qsize()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("wandb did not finish within %.0f s; metrics.jsonl is complete", self._close_timeout_s)
        elif self._left_out:
            log.warning("%d records did not reach wandb; metrics.jsonl is complete", self._left_out)

    def _work(self, settings: dict[str, Any]) -> None:
        try:
            self._send_all(settings)
        # wandb raises what it likes (its own, OSError, protobuf's); none of it may reach training.
        except Exception as error:  # noqa: BLE001
            self.failed = True
            log.warning("wandb failed (%s: %s); training goes on without it", type(error).__name__, error)

    def _send_all(self, settings: dict[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=60)
        run = wandb.init(mode=self.mode, resume="allow", settings=quiet, **settings)
        run.define_metric("*", step_metric="version")
        while (record := self._queue.get()) is not None:  # deadline: close() queues None, the thread is a daemon
            run.log(record)
        run.finish()


def flat_record(metrics: AnyMetrics) -> dict[str, Any]:
    """`version`, and each figure as kind/name or kind/name/part; of alarms the number, and what is None is left out."""
    record = to_record(metrics)
    kind = record.pop("kind")
    flat: dict[str, Any] = {"version": record.pop("version")}
    if "alarms" in record:
        record["alarms"] = len(record["alarms"])
    flat.update(_flattened(kind, record))
    return flat


def _flattened(prefix: str, record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flattened(f"{prefix}/{name}", value)
        elif value is not None and not isinstance(value, list):
            yield f"{prefix}/{name}", value


def has_wandb_key() -> bool:
    """Whether wandb would find a key without asking: WANDB_API_KEY, or its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _kept_id(folder: Path) -> str:
    path = folder / "wandb_id"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="ascii")
    return path.read_text(encoding="ascii").strip()

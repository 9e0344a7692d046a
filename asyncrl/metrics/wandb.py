"""Weights & Biases as a sink of metrics. It may fail, be slow or be absent: training does not notice."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from asyncrl.metrics.json_records import to_record
from asyncrl.metrics.types import AnyMetrics

log = logging.getLogger(__name__)

WANDB_QUEUE = 1000  # records that wait to be sent
INIT_TIMEOUT_S = 60

Mode = Literal["offline", "online"]
Records = queue.Queue[dict[str, Any] | None]  # None is the end


@dataclass(frozen=True, slots=True)
class WandbRun:
    """What wandb is told about a run. A restart of the learner has the same `id`, and so continues the same run."""

    project: str
    name: str
    id: str
    folder: Path
    config: dict[str, Any]


class WandbSink:
    """Sends records from a thread of its own: importing wandb, starting it and the network take seconds.

    Without a key, `online` becomes offline; nobody is ever prompted. When the queue is full, records are counted and
    left out (metrics.jsonl has them all).
    """

    def __init__(
        self,
        run: WandbRun,
        *,
        online: bool,
        close_timeout_s: float = 10.0,
        send: Callable[[WandbRun, Mode, Records], None] | None = None,
    ) -> None:
        """close_timeout_s: how long `close` waits. send: what the thread runs, `send_records` if None."""
        if online and not has_wandb_key():
            log.warning("no Weights & Biases key found (WANDB_API_KEY or ~/.netrc); logging offline, see `wandb sync`")
            online = False
        self.mode: Mode = "online" if online else "offline"
        self.failed = False
        self._left_out = 0
        self._close_timeout_s = close_timeout_s
        self._records: Records = queue.Queue(maxsize=WANDB_QUEUE)
        self._thread = threading.Thread(target=self._work, args=(run, send or send_records), name="wandb", daemon=True)
        self._thread.start()

    def write(self, metrics: AnyMetrics) -> None:
        """Queues one record; never blocks."""
        if self.failed:
            return
        try:
            self._records.put_nowait(flat_record(metrics))
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Waits until everything queued is sent, at most close_timeout_s."""
        deadline = time.monotonic() + self._close_timeout_s
        try:
            self._records.put(None, timeout=self._close_timeout_s)
        except queue.Full:
            self._left_out += self._records.qsize()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("wandb did not finish within %.0f s; metrics.jsonl is complete", self._close_timeout_s)
        elif self._left_out:
            log.warning("%d records did not reach wandb; metrics.jsonl is complete", self._left_out)

    def _work(self, run: WandbRun, send: Callable[[WandbRun, Mode, Records], None]) -> None:
        try:
            send(run, self.mode, self._records)
        # Broad, because wandb raises errors of its own, OSError, protobuf's and pydantic's, and what it raises changes
        # between versions; none of it may reach training, which has all its figures in metrics.jsonl.
        except Exception as error:  # noqa: BLE001
            self.failed = True
            log.warning("wandb failed (%s: %s); training goes on without it", type(error).__name__, error)


def send_records(run: WandbRun, mode: Mode, records: Records) -> None:
    """Sends `records` to wandb until None comes; raises whatever wandb raises."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=INIT_TIMEOUT_S)
    sent = wandb.init(
        mode=mode,
        resume="allow",
        settings=settings,
        project=run.project,
        name=run.name,
        id=run.id,
        dir=str(run.folder),
        config=run.config,
    )
    sent.define_metric("*", step_metric="version")
    while (record := records.get()) is not None:  # no deadline: `close` ends the records, and the thread is a daemon
        sent.log(record)
    sent.finish()


def flat_record(metrics: AnyMetrics) -> dict[str, Any]:
    """The record as wandb takes it: `version`, and each number as kind/name or kind/name/part.

    Of the alarms it holds how many are on. Figures that are None are left out.
    """
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
    """Whether wandb would find a key without asking: in WANDB_API_KEY, or for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def kept_id(folder: Path) -> str:
    """The id of the wandb run of a run folder, made at the first call and kept in its file `wandb_id`."""
    path = folder / "wandb_id"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="ascii")
    return path.read_text(encoding="ascii").strip()

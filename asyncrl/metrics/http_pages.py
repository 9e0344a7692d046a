"""`/healthz` and `/metrics` of a daemon, over HTTP, from a thread of their own.

The daemon's event loop only writes down what it does (`Pulse`, `Exposition`); it never waits for a reader.

Nothing secret is here, and no text of a prompt or completion: whoever reaches the address may read it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from asyncrl import __version__
from asyncrl.errors import ConfigError
from asyncrl.host.addresses import AUTO, OFF, http_address
from asyncrl.metrics.exposition import CONTENT_TYPE, Exposition, Family
from asyncrl.metrics.health import STALL_S, Pulse
from asyncrl.metrics.http_server import HttpAnswer, HttpServer, Page

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
FOLDER = "http"  # in run.dir: one file for each daemon, which Prometheus reads by file_sd_configs


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a daemon shows of itself: who it is, whether its loop turns, its figures."""

    daemon: str  # learner, or generator-NAME
    run: str
    pulse: Pulse
    figures: Exposition

    def health(self) -> HttpAnswer:
        """The answer to /healthz: 200 while the event loop turns, else 503; as JSON what the daemon does."""
        health = self.pulse.look()
        told = {
            "state": health.state.value,
            "waits_for": health.waits_for,
            "ready": health.ready,
            "loop_age_s": round(health.loop_age_s, 3),
            "loop_turns": health.turns,
            "daemon": self.daemon,
            "run": self.run,
            "version": __version__,
            "pid": os.getpid(),
        }
        status = HTTPStatus.OK if health.turns else HTTPStatus.SERVICE_UNAVAILABLE
        return HttpAnswer(status, "application/json", f"{json.dumps(told)}\n".encode())

    def metrics(self) -> HttpAnswer:
        """The answer to /metrics."""
        page = self.figures.render([*self._own(), *_process()])
        return HttpAnswer(HTTPStatus.OK, CONTENT_TYPE, page.encode())

    def _own(self) -> Iterator[Family]:
        health = self.pulse.look()
        who = {"daemon": self.daemon, "run": self.run, "version": __version__}
        yield Family("asyncrl_info", "gauge", "1, and who this is.", tuple(who), {tuple(who.values()): 1.0})
        text = f"Time since the event loop turned; from {STALL_S:g} on it hangs, and /healthz says so."
        yield Family("asyncrl_loop_age_seconds", "gauge", text, samples={(): health.loop_age_s})
        text = "1 when the daemon can do its work."
        yield Family("asyncrl_ready", "gauge", text, samples={(): float(health.ready)})
        yield Family("asyncrl_state", "gauge", "1 for what it does.", ("state",), {(health.state.value,): 1.0})


def _process() -> Iterator[Family]:
    """The figures of a process that dashboards expect under these names; of this one alone, without its children."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime
    yield Family("process_cpu_seconds_total", "counter", "CPU time of this process.", samples={(): seconds})
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        size = float(pages * resource.getpagesize())
        yield Family("process_resident_memory_bytes", "gauge", "Resident memory of this process.", samples={(): size})


class HttpPages:
    """Serves the pages of one daemon until `close`."""

    def __init__(self, listening: socket.socket, vitals: Vitals, told: Path) -> None:
        """listening: a bound socket, which this closes. told: the file that says where it is, removed at the end."""
        pages: dict[str, Page] = {
            "/healthz": lambda request: vitals.health(),
            "/metrics": lambda request: vitals.metrics(),
        }
        self.server = HttpServer(listening, pages)
        self._told = told

    @classmethod
    def open(cls, address: str, key: str, vitals: Vitals, run_dir: Path) -> HttpPages | None:
        """Binds at the value `address` of the configuration key `key`, and serves; None for off.

        Raises ConfigError when the address cannot be had.
        """
        if address == OFF:
            return None
        host, port = (LOOPBACK, 0) if address == AUTO else http_address(address, key)
        try:
            listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(
                f"{key}={address} cannot be had here ({why}); give a free port of an address of this host, or {AUTO} "
                f"for any free port of {LOOPBACK}, or {OFF}"
            ) from error
        pages = cls(listening, vitals, run_dir / FOLDER / f"{vitals.daemon}.json")
        pages._tell(vitals)
        pages.server.start()
        return pages

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the pages."""
        return self.server.address

    def close(self) -> None:
        """Ends the thread; readers that are at it are cut off."""
        self._told.unlink(missing_ok=True)
        self.server.close()

    def _tell(self, vitals: Vitals) -> None:
        """Logs the address and writes it where Prometheus can read it; a disk that refuses costs that file alone."""
        log.info("health and metrics: %s/healthz and /metrics", self.server.url)
        target = self.server.url.removeprefix("http://")
        labels = {"run": vitals.run, "daemon": vitals.daemon, "host": socket.gethostname()}
        try:
            self._told.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._told.with_suffix(".new")
            fresh.write_text(json.dumps([{"targets": [target], "labels": labels}]) + "\n", encoding="utf-8")
            fresh.replace(self._told)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self._told, error)

"""What the generators of a run that is measured say of themselves, at two moments: their `/metrics` pages."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from asyncrl.errors import UserError
from asyncrl.metrics.http_pages import FOLDER
from asyncrl.metrics.ledger import add, since

POLL_S = 0.02
SURE_S = 0.05  # between two looks: figures that came within it are dated well enough
NEWS_TIMEOUT_S = 5.0  # a generator writes its figures down once a second at least
READ_TIMEOUT_S = 2.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this host's loopback
_SAMPLE = re.compile(r'^asyncrl_generator_(\w+?)(?:\{activity="(\w+)"\})? (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class GeneratorFigures:
    """Totals of one generator since its start, and when it wrote them down, by this process's clock."""

    at_s: float
    tokens: float
    time_s: Mapping[str, float]

    @property
    def lived_s(self) -> float:
        """Its time since it started: it grows with all that it writes down."""
        return sum(self.time_s.values())


@dataclass(slots=True)
class GeneratorWindow:
    """What all generators did between two moments, summed over them.

    time_s is by their own ledgers, wall_s by the clock of this process: the two are the same time.
    """

    num_generators: int = 0
    wall_s: float = 0.0
    tokens: float = 0.0
    time_s: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all of them sampled in a second."""
        return self.tokens * self.num_generators / self.wall_s if self.wall_s > 0.0 else 0.0


def fresh_figures(run_dir: Path, check: Callable[[], None]) -> dict[str, GeneratorFigures]:
    """The figures of every generator of a run on this host, each as soon as it writes new ones.

    Waiting for new ones says when they are from: a page may be a second old. Where the machine is busy and two looks
    are far apart, the next ones are waited for, half of the time. check raises when the run has ended.
    Raises UserError when a generator says nothing new for NEWS_TIMEOUT_S.
    """
    addresses = _addresses(run_dir)
    before = {name: _read(address) for name, address in addresses.items()}
    found: dict[str, GeneratorFigures] = {}
    deadline = time.monotonic() + NEWS_TIMEOUT_S
    patient_until = time.monotonic() + NEWS_TIMEOUT_S / 2
    while len(found) < len(addresses):
        check()
        for name in addresses.keys() - found.keys():
            now, old = _read(addresses[name]), before[name]
            if now is not None and old is not None and now.lived_s != old.lived_s:
                gap_s = now.at_s - old.at_s
                if gap_s <= SURE_S or now.at_s >= patient_until:
                    found[name] = replace(now, at_s=now.at_s - gap_s / 2)
            before[name] = now or old
        if time.monotonic() >= deadline and len(found) < len(addresses):
            missing = ", ".join(sorted(addresses.keys() - found.keys()))
            raise UserError(f"{missing} wrote no figures for {NEWS_TIMEOUT_S:.0f} s: it hangs, or has ended")
        time.sleep(POLL_S)
    return found


def window_between(
    before: Mapping[str, GeneratorFigures], after: Mapping[str, GeneratorFigures]
) -> GeneratorWindow | None:
    """What generators did between two moments; None where one of them began anew, came or left."""
    if not before or before.keys() != after.keys():
        return None
    window = GeneratorWindow(len(before))
    for name, then in before.items():
        now = after[name]
        if now.lived_s < then.lived_s:
            return None  # a new process, which counts from zero
        window.wall_s += now.at_s - then.at_s
        window.tokens += now.tokens - then.tokens
        add(window.time_s, since(then.time_s, now.time_s))
    return window


def parsed(page: str, at_s: float) -> GeneratorFigures:
    """The figures on a page of a generator that was read at at_s. A figure that is not there yet is 0."""
    totals: dict[str, float] = {}
    time_s: dict[str, float] = {}
    for name, activity, value in _SAMPLE.findall(page):
        if name == "time_seconds_total" and activity:
            time_s[activity] = float(value)
        elif not activity:
            totals[name] = float(value)
    return GeneratorFigures(at_s, totals.get("tokens_generated_total", 0.0), time_s)


def _addresses(run_dir: Path) -> dict[str, str]:
    """Where the generators show their pages, by the name of each."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("generator-*.json")):
        (entry,) = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem] = f"http://{entry['targets'][0]}/metrics"
    return found


def _read(address: str) -> GeneratorFigures | None:
    """None where nobody answers: it may be on its way up again, and the caller has a deadline."""
    try:
        with _OPENER.open(address, timeout=READ_TIMEOUT_S) as answer:
            page = answer.read().decode("utf-8", "replace")
    except OSError:  # URLError is one
        return None
    return parsed(page, time.monotonic())

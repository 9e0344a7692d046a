"""The table of figures in README.md, made of what is committed in benchmarks/results, wins and losses alike.

`python -m benchmarks --readme` writes it between the two markers; a test holds that it is up to date.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures: python -m benchmarks --readme -->", "<!-- end of figures -->"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: some ratios of results files, each under a short name, and the script that measures them.

    ratios: (name to show, results file, start of `what`, unit, start of `against`).
    """

    sentence: str
    ratios: tuple[tuple[str, str, str, str, str], ...]
    script: str


ENTRIES = (
    Entry(
        "tokens/s sampled and trained on, against TRL 1.16 with its transformers engine, its vLLM (10 M parameters)",
        (
            ("equal lengths", "end_to_end_vs_trl", "10M", "tokens/s", "TRL"),
            ("lognormal", "end_to_end_vs_trl_lognormal", "10M", "tokens/s", "TRL"),
        ),
        "speed.end_to_end_vs_trl",
    ),
    Entry(
        "the same of the trainer's step alone",
        (
            ("equal lengths", "learner_vs_trl", "10M, float32, 64 completions of equal", "tokens/s", "TRL"),
            ("lognormal", "learner_vs_trl", "10M, float32, 64 completions of lognormal", "tokens/s", "TRL"),
        ),
        "speed.learner_vs_trl",
    ),
    Entry(
        "the generator's tokens/s against raw vLLM, fixed and geometric lengths",
        tuple(
            (f"{count} {law}", "generator_vs_vllm", f"0.8M, {count} sequences, {law}", "tokens/s", "raw vLLM")
            for count in (64, 128)
            for law in ("fixed", "geometric")
        ),
        "speed.generator_vs_vllm",
    ),
    Entry(
        "milliseconds of a weight sync (10 M parameters; less is better)",
        (
            ("no token sampled, of vLLM's pause and reload", "weight_sync", "10M (38.8 MB) standstill", "ms", "vLLM"),
            ("training held up, of one copy", "weight_sync", "10M (38.8 MB) learner blocked", "ms", "one copy"),
        ),
        "speed.weight_sync",
    ),
    Entry(
        "the rollout link: ns per token of encoding (less is better), frames/s encrypted",
        (
            ("of lists in msgpack", "transport", "encode", "ns/token", "lists in msgpack"),
            ("of JSON", "transport", "encode", "ns/token", "lists in JSON"),
            ("17 kB, of bare ZeroMQ", "transport", "socket, frames of 17 kB", "frames/s", "bare pyzmq"),
            ("1 MB", "transport", "socket, frames of 1 MB", "frames/s", "bare pyzmq"),
        ),
        "speed.transport",
    ),
    Entry(
        "seconds of 40 steps, `max_age=2` against synchronous (less is better)",
        (("", "async_vs_sync", "training, 40 steps", "s", "max_age=0"),),
        "studies.async_vs_sync",
    ),
)


def table(results: Path = RESULTS) -> str:
    """The rows in Markdown. Raises LookupError for a figure that is not committed."""
    lines = ["| Median ratio to a reference in the same run, on 2 CPU cores | | `python -m benchmarks --run` |"]
    lines.append("|---|---|---|")
    for entry in ENTRIES:
        shown = "; ".join(f"{name} {_shown(_median(results, *place))}".strip() for name, *place in entry.ratios)
        lines.append(f"| {entry.sentence} | {shown} | `{entry.script}` |")
    return "\n".join(lines)


def _shown(ratio: float) -> str:
    """Two figures below 1, three from there on."""
    return f"{ratio:.2g}" if ratio < 1 else f"{ratio:.3g}"


def _median(results: Path, file: str, what: str, unit: str, against: str) -> float:
    rows = json.loads((results / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["what"].startswith(what) and row["unit"] == unit and row.get("against", "").startswith(against):
            return float(row["ratio_median"])
    raise LookupError(f"{file}.json has no ratio of {what!r} in {unit} against {against}: measure it again")


def with_table(page: str, results: Path = RESULTS) -> str:
    """The page with the table of today between its markers. Raises ValueError for a page without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have {BEGIN} and, below it, {END}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"

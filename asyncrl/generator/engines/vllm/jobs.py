"""What the workers of an engine say of the job that they are at, each for itself, as one answer."""

from __future__ import annotations

from typing import Any


def slowest_ms(jobs: list[dict[str, Any]], whole: str = "stage_ms") -> dict[str, float]:
    """What a job, under the name `whole`, and each of its parts took in the worker where that took longest."""
    names = {name for job in jobs for name in job["timings_ms"]}
    parts = {name: max(job["timings_ms"].get(name, 0.0) for job in jobs) for name in sorted(names)}
    return {whole: max(job["elapsed_ms"] for job in jobs), **parts}


def progress(jobs: list[dict[str, Any]], first_rank: int = 0) -> str:
    """How far the job of each worker has come that is not done with it."""
    told = [
        f"worker {rank} {job['state']} in phase {job['phase']}"
        + (f", {job['received_bytes']} of {job['total_bytes']} bytes received" if job["phase"] == "stage" else "")
        for rank, job in enumerate(jobs, first_rank)
        if job["state"] != "done"
    ]
    return ", ".join(told) or "no worker has told how far it is"

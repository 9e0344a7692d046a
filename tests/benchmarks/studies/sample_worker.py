"""A worker of studies whose jobs say what becomes of it."""

from __future__ import annotations

import os

from benchmarks.studies import shared


def run(job: shared.Job) -> dict:
    if job["fate"] == "dies":
        os._exit(9)
    if job["fate"] == "raises":
        raise ValueError("as asked")
    print("a library that prints")
    return {"accuracy": job["seed"] / 10, "pid": os.getpid()}


if __name__ == "__main__":
    shared.serve(run)

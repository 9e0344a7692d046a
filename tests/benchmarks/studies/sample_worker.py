"""A worker of studies whose jobs say what becomes of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # benchmarks are not installed

from benchmarks import studies


def run(job: studies.Job) -> dict:
    if job["fate"] == "dies":
        os._exit(9)
    if job["fate"] == "raises":
        raise ValueError("as asked")
    print("a library that prints")
    return {"accuracy": job["seed"] / 10, "pid": os.getpid()}


if __name__ == "__main__":
    studies.serve(run)

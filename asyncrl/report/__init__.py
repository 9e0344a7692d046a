"""What a run came to, read back from metrics.jsonl: `run_records` (typed lines), `summary`, `page`, `writing` of both.

`watch` shows the page of a run that goes on, `compare` several runs beside each other.
"""

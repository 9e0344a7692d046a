"""What a run came to, read back from metrics.jsonl: `run_records` (typed lines), `summary` and `picture`."""

"""Rollout engines: what samples completions, and what watches over it."""

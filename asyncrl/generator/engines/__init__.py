"""Rollout engines: `base` says what one must do, `watch` finds one that hangs, `vllm` is the one there is."""

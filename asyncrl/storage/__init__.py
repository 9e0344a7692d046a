"""Bytes that must survive a crash: the rollout journal and the files of checkpoints."""

"""The trainer: a process for each rank, which makes steps and publishes the policy. Models are in `engines`."""

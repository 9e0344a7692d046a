"""What is sent of a policy version: layout, digests, deltas."""

"""A run without a model: the learner's own rules for leases and batches, over times that were measured or are given."""

"""The learner's processes that train: one rank each."""

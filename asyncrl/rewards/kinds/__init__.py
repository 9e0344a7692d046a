"""The kinds of reward parts that a configuration can name."""

"""The two commands: they parse and check first, and import torch only when there is something to run."""

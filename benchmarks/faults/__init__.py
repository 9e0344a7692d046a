"""Faults: runs that are disturbed on purpose, and the judges of what became of them."""

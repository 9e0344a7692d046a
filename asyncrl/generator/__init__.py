"""The generator daemon: leases in, scored groups of completions out, weights updated in flight."""

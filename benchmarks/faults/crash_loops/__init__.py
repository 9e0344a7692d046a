"""Kills the processes of a run again and again, and holds what they had promised against what is left."""

"""What a run came to: its records read back, the summary, the picture."""

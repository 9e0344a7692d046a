"""What a message may be: its base, its registry, and the bounds of its encoded body."""

"""How the bytes of a policy version move: one class for each transport."""

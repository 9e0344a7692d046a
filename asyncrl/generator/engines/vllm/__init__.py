"""The rollout engine vLLM."""

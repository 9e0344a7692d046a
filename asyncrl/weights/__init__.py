"""How a policy version travels from the trainer into the rollout engines, and what proves that it arrived."""

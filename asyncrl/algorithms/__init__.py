"""Losses, advantages and their parts: pure functions of tensors, without configuration, logging or devices."""

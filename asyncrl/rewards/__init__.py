"""Rewards: named parts, and the workers that compute them."""

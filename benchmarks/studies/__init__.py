"""Studies of learning: methods, policy ages, critics, over several seeds."""

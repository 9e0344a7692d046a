"""Model engines: how the policy is held, run and updated."""

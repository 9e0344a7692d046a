"""The task of simulated runs. Nobody makes one: prompts and rewards of the simulation come from elsewhere."""


class Task:
    """A name for the configuration."""

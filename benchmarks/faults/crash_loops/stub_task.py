"""The name of a task for the configuration of crash loops. Prompts and rewards come from the stubs."""


class StubTask:
    """Never made."""

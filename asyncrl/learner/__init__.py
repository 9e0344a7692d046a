"""The learner daemon: the desk process, which owns sockets and rollouts, and the trainer, which owns the model."""

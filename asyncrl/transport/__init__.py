"""How the two daemons talk: messages, sessions and sockets for rollouts, process groups for weights."""

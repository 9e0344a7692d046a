"""Between the socket and the optimizer: leases, the durable journal, the replay buffer, packing."""

"""From lease to batch: leases, pacing, the replay buffer, filtering, recovery. No bytes, no sockets, no torch."""

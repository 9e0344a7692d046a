"""Every deadline and bound of the two links, in one place. Both ends of a session read the same values."""

from __future__ import annotations

# Link level: ZMTP heartbeats. The peers of the desk ask, it answers; they notice a cut cable within interval + timeout,
# so within 3 s. It notices HEARTBEAT_TTL_MS after a question, unless a message was the last that came: then by the
# beats that are missing, after DEAD_S. So questions are to come much more often than messages.
HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2_500
HEARTBEAT_TTL_MS = 3_000
HANDSHAKE_MS = 5_000
CONNECT_TIMEOUT_MS = 3_000
TCP_MAX_RETRANSMIT_MS = 10_000
RECONNECT_MS = 200
RECONNECT_MAX_MS = 1_000  # a learner that restarts is found within a second of being back

# Queues between application and I/O thread, in frames. Credit is the real bound, these are the backstop. Sending
# comes in bursts (one lease per free sequence, a full outbox after a reconnect) of frames kept in any case.
DESK_RECEIVE_QUEUE_FRAMES = 8  # of each peer
PEER_RECEIVE_QUEUE_FRAMES = 4_096
SEND_QUEUE_FRAMES = 256
# One call of receive() returns after this many frames, so that a busy peer cannot starve the loop.
DRAIN_FRAMES = 256

# Process level: ZMTP heartbeats come from the I/O thread and do not see a process that hangs; beats do.
BEAT_S = 1.0
SUSPECT_S = 5.0
DEAD_S = 15.0
NO_PROGRESS_S = 120.0

RESEND_FIRST_S = 0.5
RESEND_MAX_S = 8.0

# The number of a result (seq) may be at most this far above the oldest that is not settled: it bounds what the desk
# must remember of the results that it has seen.
SEQ_WINDOW = 1024
# Generators whose results the desk remembers; the generator that is gone for longest is forgotten first.
MAX_GENERATORS = 4096

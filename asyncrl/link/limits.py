"""Every deadline and bound of the two links, in one place. Both ends of a session read the same values."""

from __future__ import annotations

# Link level: ZMTP heartbeats. The peers of the desk ask, it answers; they notice a cut cable within interval + timeout,
# so within 3 s. It notices HEARTBEAT_TTL_MS after a question, unless a message was the last that came: then by the
# beats that are missing, after SUSPECT_S and DEAD_S.
HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2_500
HEARTBEAT_TTL_MS = 3_000
HANDSHAKE_MS = 5_000
CONNECT_TIMEOUT_MS = 3_000
TCP_MAX_RETRANSMIT_MS = 10_000
# Between two tries to connect. A learner that restarts is found so soon after it listens. While it is away, 1,000
# generators spend a third of a core on that, all of them together.
RECONNECT_MS = RECONNECT_MAX_MS = 100
BACKLOG = 4_096  # connections that wait for the desk to take them: those of a whole fleet, which come at once

# Queues between application and I/O thread, in frames. Credit is the real bound, these are the backstop. Sending
# comes in bursts (one lease per free sequence, a full outbox after a reconnect) of frames kept in any case.
DESK_RECEIVE_QUEUE_FRAMES = 8  # of each peer
PEER_RECEIVE_QUEUE_FRAMES = 4_096
SEND_QUEUE_FRAMES = 256
# One call of receive() returns after this many frames, so that a busy peer cannot starve the loop. The desk takes
# fewer, of its whole fleet, at 0.1 to 0.2 ms each: it looks at its deadlines every few milliseconds.
DRAIN_FRAMES = 256
DESK_DRAIN_FRAMES = 32

# Process level: ZMTP heartbeats come from the I/O thread and do not see a process that hangs; beats do. Up to 125
# generators beat once in BEAT_S. More beat less often, so that all of them together send BEATS_PER_S: 1,000 generators
# once in 8 s. The times of silence, which are those at BEAT_S, grow by as much (`suspect_s`, `dead_s`).
BEAT_S = 1.0
MAX_BEAT_S = 8.0  # one that is lost must not make a generator dead: twice as long is less than `dead_s`
BEATS_PER_S = 125.0
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


def beat_s(num_generators: int) -> float:
    """Seconds between two beats of one generator in a fleet of so many."""
    return min(MAX_BEAT_S, max(BEAT_S, num_generators / BEATS_PER_S))


def suspect_s(beat_s: float) -> float:
    """Seconds of silence after which one side doubts the other, where a beat is due every `beat_s` seconds.

    A generator whose connection is gone as well is dead then.
    """
    return SUSPECT_S + beat_s - BEAT_S


def dead_s(beat_s: float) -> float:
    """Seconds of silence after which a generator is dead that is to beat every `beat_s` seconds."""
    return DEAD_S + beat_s - BEAT_S

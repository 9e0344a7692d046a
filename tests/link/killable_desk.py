"""A desk as a process, to be killed: journals what it accepts with an fsync, then acknowledges.

usage: killable_desk.py FOLDER PORT
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from asyncrl.link import codec
from asyncrl.link.desk_session import DeskSessions, Expected, Seen
from asyncrl.link.messages import Beat, Hello
from asyncrl.link.sockets import ServerSocket

MAX_BYTES = 1 << 20


def next_run_epoch(folder: Path) -> int:
    path = folder / "run_epoch"
    epoch = int(path.read_text()) + 1 if path.exists() else 1
    path.with_suffix(".new").write_text(str(epoch))
    os.replace(path.with_suffix(".new"), path)
    return epoch


def replay(journal: Path, sessions: DeskSessions) -> None:
    """Settles what the journal holds and cuts off a torn last line."""
    text = journal.read_text() if journal.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    journal.write_text(whole)
    for line in whole.splitlines():
        incarnation, seq, _ = map(int, line.split())
        sessions.replay("g", incarnation, seq, now=time.monotonic())


def main() -> None:
    folder, port = Path(sys.argv[1]), sys.argv[2]
    sessions = DeskSessions(
        run_epoch=next_run_epoch(folder),
        run_name="run",
        expected=Expected("model-1", "tokenizer-1", "tasks:Task"),
        credit_bytes=10_000,
        max_frame_bytes=MAX_BYTES,
    )
    replay(folder / "journal", sessions)
    socket = ServerSocket(f"tcp://127.0.0.1:{port}", max_frame_bytes=MAX_BYTES)
    with (folder / "journal").open("a") as journal:
        while True:
            new = []
            for peer, frame in socket.poll(1.0):
                now, message = time.monotonic(), codec.decode(frame, max_bytes=MAX_BYTES)
                if isinstance(message, Hello):
                    reply = sessions.hello(peer, message, version=0, now=now).reply
                elif (session := sessions.of(peer, now)) is None:
                    reply = sessions.unknown_peer()
                elif isinstance(message, Beat):
                    session.on_beat(message, now)
                    reply = sessions.ack(session)
                elif sessions.see(session, message.seq, len(frame)) is Seen.NEW:
                    journal.write(f"{session.incarnation} {message.seq} {message.ordinal}\n")
                    new.append((peer, session, message.seq))
                    continue
                else:
                    reply = sessions.ack(session)
                socket.send_message(peer, reply)
            if new:
                journal.flush()
                os.fsync(journal.fileno())  # the promise: first the disk, then the Ack
                for _, session, seq in new:
                    sessions.mark_durable(session, seq)
                for peer, session in {peer: session for peer, session, _ in new}.items():
                    socket.send_message(peer, sessions.ack(session))


if __name__ == "__main__":
    main()

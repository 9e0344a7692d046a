"""The links between processes: messages, frames, sockets, sessions."""

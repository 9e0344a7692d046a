"""Stands for a process that writes rollouts on a disk that does not answer: it reads nothing, and never ends."""

import signal

if __name__ == "__main__":
    signal.pause()

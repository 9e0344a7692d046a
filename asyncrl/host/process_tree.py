"""A process and its descendants: which they are, their commands, the memory they hold.

What ends while it is looked at counts as nothing.
"""

from __future__ import annotations

from pathlib import Path


def children_of(pid: int) -> set[int]:
    """The processes that this one started, by any of its threads."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.update(int(child) for child in task.read_text().split())
        except OSError:
            continue  # the thread has ended
    return found


def tree_of(root: int) -> set[int]:
    """The process and all its descendants."""
    found, open_ends = {root}, [root]
    while open_ends:
        children = children_of(open_ends.pop()) - found
        found |= children
        open_ends += children
    return found


def command_of(pid: int) -> str:
    """The command line, with blanks between its words; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def memory_of_tree(root: int) -> int:
    """Bytes of physical memory that a process and its descendants hold; what they share counts once."""
    return sum(map(_proportional_bytes, tree_of(root)))


def memory_by_branch(root: int) -> dict[str, int]:
    """The same by the command line of each child of `root`, with all descendants of that; "" is `root` itself.

    Children of one command line count together. What branches share is divided among them.
    """
    found: dict[str, int] = {"": _proportional_bytes(root)}
    for child in children_of(root):
        command = command_of(child)
        found[command] = found.get(command, 0) + memory_of_tree(child)
    return found


def _proportional_bytes(pid: int) -> int:
    """The proportional set size: each shared page divided by the number of processes that share it."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0

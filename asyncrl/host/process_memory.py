"""The memory of a process and all its descendants."""

from __future__ import annotations

from pathlib import Path


def memory_of_tree(root: int) -> int:
    """Bytes that the process `root` and its descendants hold in memory; what they share counts once.

    A process that ends meanwhile counts as nothing.
    """
    parents = _parents()
    return sum(_proportional_bytes(pid) for pid in parents if _descends(pid, root, parents))


def memory_by_branch(root: int) -> dict[str, int]:
    """The same by the command line of each child of `root`, with all descendants of that; "" is `root` itself.

    Children of one command line count together. What branches share is divided among them.
    """
    parents = _parents()
    found: dict[str, int] = {"": _proportional_bytes(root)}
    for child in [pid for pid, parent in parents.items() if parent == root]:
        command = _command(child)
        held = sum(_proportional_bytes(pid) for pid in parents if _descends(pid, child, parents))
        found[command] = found.get(command, 0) + held
    return found


def _parents() -> dict[int, int]:
    """The parent of each process of this host."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has ended
    return parents


def _command(pid: int) -> str:
    """The command line, with blanks between its words; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root


def _proportional_bytes(pid: int) -> int:
    """The proportional set size: each shared page divided by the number of processes that share it."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0

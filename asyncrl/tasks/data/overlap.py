"""Prompts that training and evaluation have in common: an evaluation says nothing of what was trained on.

Two prompts ask the same when the texts of all messages but the system's are equal, however their blanks are set; a
plain text is what a user says. What a chat template or a system prompt puts around it does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field


def asked_key(prompt: object) -> bytes:
    """Equal where two prompts ask the same; empty for what is no prompt, which is refused elsewhere."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        if message.get("role") != "system":
            words = " ".join(str(message.get("content")).split())
            digest.update(f"{message.get('role')}\0{words}\1".encode("utf-8", "surrogatepass"))
    return digest.digest()


@dataclass(slots=True)
class HeldOutPrompts:
    """What the held-out examples ask, and whose each is."""

    whose: dict[bytes, str] = field(default_factory=dict)

    def add(self, prompt: object, whose: str) -> None:
        """Takes in a held-out example; `whose` is what messages call it."""
        if key := asked_key(prompt):
            self.whose.setdefault(key, whose)

    def asked_by(self, prompt: object) -> str | None:
        """Which held-out example asks the same; None where none does."""
        return self.whose.get(asked_key(prompt)) if self.whose else None

"""Makes the things that the replay tests are about."""

from __future__ import annotations

from asyncrl.storage.records import StoredGroup


def make_group(ordinal, *, version=0, attempt=0, issued=None, num_tokens=(4, 5), body=b"", seq=None):
    """A stored group of one version; its body defaults to a few bytes that name it."""
    return StoredGroup(
        generator_id="g1",
        incarnation=1,
        seq=ordinal if seq is None else seq,
        ordinal=ordinal,
        attempt=attempt,
        issued_version=version if issued is None else issued,
        oldest_version=version,
        newest_version=version,
        num_tokens=tuple(num_tokens),
        body=body or f"body {ordinal}.{attempt}".encode(),
    )

"""Manifests without tensors, for those who look at versions and digests alone."""

from __future__ import annotations

from asyncrl.link.weight_records import ALIGNMENT, WeightLayout, WeightManifest


def manifest_of(version, digests) -> WeightManifest:
    """A manifest of one bucket for each digest."""
    starts = [place * ALIGNMENT for place in range(len(digests))]
    layout = WeightLayout(len(digests) * ALIGNMENT, (), tuple((start, start + ALIGNMENT) for start in starts))
    return WeightManifest(version, layout, tuple(digests))

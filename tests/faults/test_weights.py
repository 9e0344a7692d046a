"""Weights: what a digest sees, what an engine computes with, which model folders are trained, where channels meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.weights.bytes.digest import digest
from benchmarks.speed.digest import damages, try_damage

TRIES = 2000


def test_W1_a_complemented_word_and_8_kib_of_ones_have_another_digest():
    zeros, ones = torch.zeros(8192, dtype=torch.uint8), torch.full((8192,), 255, dtype=torch.uint8)
    assert digest(zeros) != digest(ones)
    words = torch.randint(-(2**62), 2**62, (64,))
    for index in range(64):
        other = words.clone()
        other[index] = ~other[index]
        assert digest(other) != digest(words)


@pytest.mark.parametrize("kind", ["flip", "complement", "swap", "shift"])
def test_W1_no_damage_to_words_gets_past_the_digest(kind):
    counted, unseen = try_damage(damages()[kind], TRIES)
    assert counted >= TRIES and unseen == 0


@pytest.mark.parametrize("kind", ["flip", "complement", "swap", "shift"])
def test_W1_the_tries_would_find_a_digest_that_is_blind(kind, monkeypatch):
    """The digest of before: it folded with an arithmetic shift, and keys went up by the same number."""

    def blind(flat):
        words = flat.numpy().view(np.int64)
        keys = 2 * np.arange(len(words), dtype=np.int64) + 1
        return int(((words ^ (words >> 32)) * keys).sum())

    monkeypatch.setattr("asyncrl.weights.bytes.digest.digest", blind)
    _, unseen = try_damage(damages()[kind], TRIES)
    assert (unseen > 0) == (kind == "complement")


def test_W1_a_single_changed_word_at_every_place_is_seen_whatever_it_becomes():
    base = torch.zeros(300, dtype=torch.int64)
    values = [1, -1, 2**62, -(2**63), 2**32, -(2**32), 0x3F800000, 0x3F80000000000000]
    seen = {digest(base)}
    for place in range(300):
        for value in values:
            base[place] = value
            seen.add(digest(base))
        base[place] = 0
    assert len(seen) == 1 + 300 * len(values)

"""Deltas against the new bytes themselves: every form, every word size, every odd value, and damage."""

from __future__ import annotations

import contextlib
import dataclasses

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncrl.errors import ChannelError, ProtocolError, ShapeError
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import DeltaInfo, WeightManifest
from asyncrl.weights.bytes.delta import MAX_SHARE, Places, apply_delta, delta_pays, encode_delta
from asyncrl.weights.bytes.digest import digest, digest_buckets
from asyncrl.weights.bytes.layout import new_buffer, plan_buckets, tensor_views
from asyncrl.weights.bytes.snapshot import SnapshotBuffer

pytestmark = pytest.mark.bits

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def layout_of(*sizes, dtype=torch.bfloat16, bucket_bytes=4096):
    return plan_buckets([(f"t{i}", torch.zeros(size, dtype=dtype)) for i, size in enumerate(sizes)], bucket_bytes)


def words(layout, flat):
    """The tensors as integers, by name; writing to them writes to the buffer."""
    return {name: view.view(WORDS[view.element_size()]).view(-1) for name, view in tensor_views(layout, flat)}


def random_buffer(layout, seed=0):
    """Any bits there are, NaNs and infinities among them; zeros between the tensors."""
    flat, generator = new_buffer(layout), torch.Generator().manual_seed(seed)
    for tensor in words(layout, flat).values():
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
    return flat


def assert_round_trip(layout, old, new, **options):
    """Encodes, applies to a copy, compares every byte; returns the delta."""
    before = old.clone(), new.clone()
    delta = encode_delta(layout, old, new, 4, max_share=1e6, **options)
    assert torch.equal(old, before[0]) and torch.equal(new, before[1])
    assert delta.info.num_bytes == delta.payload.numel() and delta.info.base_version == 4
    flat = old.clone()
    apply_delta(layout, flat, delta.info, [delta.payload])
    assert torch.equal(flat, new)
    return delta


def kinds_of(layout, delta):
    """(kinds of the pieces, table), read from the payload as documented: int32 rows of four."""
    pieces = sum(
        -(-entry.num_bytes // entry.word_bytes // delta.info.piece_words) for entry in layout.tensors if entry.num_bytes
    )
    table = delta.payload[: 16 * pieces].view(torch.int32).view(-1, 4)
    return [Places(kind) for kind in table[:, 0].tolist()], table


# -- every pattern


@settings(max_examples=150, deadline=None)
@given(
    word_bytes=st.sampled_from([1, 2, 4, 8]),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4).filter(any),
    piece_words=st.sampled_from([1, 7, 64, 300, 100_000]),
    share=st.sampled_from([0.0, 0.003, 0.05, 0.3, 0.9, 1.0]),
    step=st.sampled_from([1, 100, 1 << 14, 1 << 30, 1 << 62]),
    seed=st.integers(0, 1000),
)
def test_any_change_of_any_words_comes_out_bit_for_bit(word_bytes, sizes, piece_words, share, step, seed):
    layout = layout_of(*sizes, dtype=DTYPES[word_bytes])
    old = random_buffer(layout, seed)
    new, generator = old.clone(), torch.Generator().manual_seed(seed + 1)
    for tensor in words(layout, new).values():
        chosen = torch.rand(tensor.shape, generator=generator) < share
        moves = torch.randint(-step, step + 1, tensor.shape, generator=generator)
        tensor[chosen] += moves.to(tensor.dtype)[chosen]
    assert_round_trip(layout, old, new, piece_words=piece_words)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200_000), max_size=40, unique=True), st.integers(-(2**15), 2**15 - 1))
@example([0], 1)
@example([200_000], -128)
@example([255, 512, 769], 127)  # gaps of 255, 256 and 256 equal words
@example([65535, 65536 + 65536], 1)
@example([256, 65793], -32768)
def test_places_far_apart_come_out_bit_for_bit(places, change):
    layout = layout_of(200_001)
    old = random_buffer(layout)
    new = old.clone()
    words(layout, new)["t0"][places] += torch.tensor(change, dtype=torch.int16)
    assert_round_trip(layout, old, new, piece_words=1 << 18)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("word_bytes", [1, 2, 4, 8])
def test_no_word_one_word_and_all_words(count, word_bytes):
    layout = layout_of(count, 1000, dtype=DTYPES[word_bytes])
    old = random_buffer(layout)
    assert assert_round_trip(layout, old, old).info.num_bytes <= 32
    one_changed = old.clone()
    words(layout, one_changed)["t1"][999] ^= 1
    assert_round_trip(layout, old, one_changed)
    other = random_buffer(layout, seed=1)
    assert_round_trip(layout, old, other)


# -- the forms


@pytest.mark.parametrize(
    ("every", "kind"),
    [
        (200_000, Places.GAPS_2),
        (1000, Places.GAPS_2),
        (100, Places.GAPS_1),
        (9, Places.GAPS_1),
        (6, Places.BITMAP),
        (2, Places.BITMAP),
    ],
)
def test_the_smallest_form_is_taken(every, kind):
    layout = layout_of(200_000)
    old = new_buffer(layout)
    new = old.clone()
    words(layout, new)["t0"][every - 1 :: every] += 1
    delta = assert_round_trip(layout, old, new)
    kinds, _ = kinds_of(layout, delta)
    assert kinds == [kind]
    count = 200_000 // every
    places = {Places.GAPS_1: count, Places.GAPS_2: 2 * count, Places.BITMAP: 25_000}[kind]
    fillers = (count if every == 200_000 else 0) * 3 * 3  # strides of 65,536 to the last word
    assert delta.info.num_bytes <= places + count + fillers + 48


def test_each_piece_takes_its_own_form():
    layout = layout_of(4000)
    old = random_buffer(layout)
    new, noise = old.clone(), random_buffer(layout, seed=1)
    tensor = words(layout, new)["t0"]
    tensor[1500:1600:50] += 1
    tensor[2000:3000:3] += 1
    tensor[3000:] = words(layout, noise)["t0"][3000:]
    delta = assert_round_trip(layout, old, new, piece_words=1000)
    assert kinds_of(layout, delta)[0] == [Places.NONE, Places.GAPS_1, Places.BITMAP, Places.ALL]


def test_a_change_that_does_not_fit_half_a_word_escapes():
    layout = layout_of(1000)
    old = new_buffer(layout)
    new = old.clone()
    words(layout, new)["t0"][::10] += 1
    words(layout, new)["t0"][[0, 10, 20, 30]] = torch.tensor([127, -128, 128, -32768], dtype=torch.int16)
    delta = assert_round_trip(layout, old, new)
    _, table = kinds_of(layout, delta)
    assert table.tolist() == [[Places.GAPS_1, 100, 3, 1]]


def test_floats_that_are_equal_but_not_the_same_are_changes():
    layout = layout_of(6, dtype=torch.float32)
    old, new = new_buffer(layout), new_buffer(layout)
    words(layout, old)["t0"].copy_(torch.tensor([0, 0, 0x7FC00000, 0x7FC00000, 0x7F800001, 1], dtype=torch.int32))
    values = torch.tensor([-(2**31), 0, 0x7FC00000, 0x7FC00001, 0x7FC00000, 0x7F800000], dtype=torch.int32)
    words(layout, new)["t0"].copy_(values)  # -0.0, 0.0, one NaN, another, a signalling one made quiet, an infinity
    assert_round_trip(layout, old, new)


def test_tied_tensors_are_compared_once():
    shared = torch.nn.Parameter(torch.arange(300, dtype=torch.bfloat16))
    named = [("embed", shared), ("norm", torch.nn.Parameter(torch.ones(7))), ("head", shared)]
    buffer = SnapshotBuffer(named, 1 << 20)
    buffer.snapshot()
    old = buffer.flat.clone()
    with torch.no_grad():
        shared[5] *= -1.0  # the sign: more than half a word
    buffer.snapshot()
    delta = assert_round_trip(buffer.layout, old, buffer.flat)
    assert kinds_of(layout_of(300, 7), delta)[1].tolist() == [[Places.GAPS_1, 1, 0, 0], [0, 0, 0, 0]]


# -- whether it pays


def changed_share(layout, share):
    old = random_buffer(layout)
    new = old.clone()
    for tensor in words(layout, new).values():
        tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < share] += 1
    return old, new


@pytest.mark.parametrize(("share", "pays"), [(0.0, True), (0.02, True), (0.5, True), (1.0, False)])
@pytest.mark.parametrize("size", [1000, 300_000])
def test_a_sample_tells_beforehand_whether_a_delta_pays(size, share, pays):
    layout = layout_of(size, size // 2)
    old, new = changed_share(layout, share)
    if share == 1.0:
        new = random_buffer(layout, seed=1)
    delta = encode_delta(layout, old, new, 1)
    assert (delta is not None) == delta_pays(layout, old, new) == pays
    assert delta is None or delta.info.num_bytes <= MAX_SHARE * layout.total_bytes


def test_a_layout_without_elements_has_no_delta_to_gain_from():
    layout = layout_of(0, 3)
    assert encode_delta(layout, new_buffer(layout), new_buffer(layout), 1).info.num_bytes == 16


# -- damage


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_delta_leaves_the_base_as_it_was(data):
    layout = layout_of(3000, 100)
    old, new = changed_share(layout, 0.05)
    delta = encode_delta(layout, old, new, 1)
    position = data.draw(st.integers(0, delta.info.num_bytes * 8 - 1))
    delta.payload[position // 8] ^= 1 << position % 8
    before = old.clone()
    with pytest.raises(ChannelError, match="damaged on the way"):
        apply_delta(layout, old, delta.info, [delta.payload])
    assert torch.equal(old, before)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4]))
def test_nonsense_with_a_fitting_digest_is_refused_or_stays_within_the_tensors(data, word_bytes):
    """As another program version might send it: never a write outside, never anything but our errors."""
    layout = layout_of(500, 60, dtype=DTYPES[word_bytes])
    old, new = changed_share(layout, 0.05)
    delta = encode_delta(layout, old, new, 1, piece_words=100)
    payload = delta.payload.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, payload.numel() - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.sampled_from([payload.numel(), payload.numel() // 16 * 8, 3]))].clone()
    info = dataclasses.replace(delta.info, num_bytes=payload.numel(), digest=digest(payload))
    before = old.clone()
    with contextlib.suppress(ProtocolError):
        apply_delta(layout, old, info, [payload])
    changed = torch.nonzero(old != before).view(-1)
    inside = torch.zeros(layout.total_bytes, dtype=torch.bool)
    for entry in layout.tensors:
        inside[entry.offset : entry.offset + entry.num_bytes] = True
    assert inside[changed].all()


def test_a_delta_applied_to_another_base_is_found_by_the_digests():
    layout = layout_of(3000)
    old, new = changed_share(layout, 0.05)
    delta = encode_delta(layout, old, new, 1)
    wrong = old.clone()
    words(layout, wrong)["t0"][17] ^= 4
    apply_delta(layout, wrong, delta.info, [delta.payload])
    assert digest_buckets(layout, wrong) != digest_buckets(layout, new)


def test_buffers_of_another_layout_are_refused():
    layout = layout_of(300)
    flat = new_buffer(layout)
    for wrong in (torch.zeros(64, dtype=torch.uint8), flat.view(torch.int16)):
        with pytest.raises(ShapeError):
            encode_delta(layout, flat, wrong, 1)
        with pytest.raises(ShapeError):
            delta_pays(layout, wrong, flat)


# -- the manifest


def test_a_manifest_takes_its_delta_over_the_wire():
    manifest = SnapshotBuffer([("x", torch.ones(3))], 128).manifest(4)
    assert "delta" not in to_plain(manifest)
    sent = dataclasses.replace(manifest, delta=DeltaInfo(3, 100, -(2**63), 1 << 18))
    assert from_plain(WeightManifest, msgpack.unpackb(msgpack.packb(to_plain(sent)))) == sent


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("digest"),
        lambda data: data.update(base_version="one"),
        lambda data: data.update(num_bytes=-1),
        lambda data: data.update(piece_words=0),
    ],
)
def test_a_malformed_delta_is_a_protocol_error(damage):
    data = to_plain(DeltaInfo(3, 100, 7, 1 << 18))
    damage(data)
    with pytest.raises(ProtocolError, match="weight delta|DeltaInfo"):
        from_plain(DeltaInfo, data)

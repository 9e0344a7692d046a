"""Records of weight syncs: the bytes they have always had, and what their constructors refuse."""

from __future__ import annotations

import dataclasses
import struct

import msgpack
import pytest

from asyncrl.errors import FrameError, ProtocolError
from asyncrl.link import codec
from asyncrl.link.messages import SyncOffer
from asyncrl.link.trainer_messages import SnapshotReady
from asyncrl.link.weight_records import (
    ALIGNMENT,
    Bucket,
    ChannelPlace,
    ChannelSpec,
    DeltaInfo,
    DeltaPayload,
    Patch,
    TensorEntry,
    WeightLayout,
    WeightManifest,
)

LAYOUT = WeightLayout(
    192, (TensorEntry("a", "float32", (3, 5), 0), TensorEntry("b", "bool", (), 64)), ((0, 128), (128, 192))
)
MANIFEST = WeightManifest(4, LAYOUT, (-(2**63), 7))
MANIFEST_MAP = {
    "version": 4,
    "layout": {
        "total_bytes": 192,
        "tensors": [["a", "float32", [3, 5], 0], ["b", "bool", [], 64]],
        "buckets": [[0, 128], [128, 192]],
    },
    "digests": [-(2**63), 7],
}
DELTA = DeltaInfo(base_version=3, num_bytes=100, digest=9, piece_words=1 << 18)
DELTA_MAP = {"base_version": 3, "num_bytes": 100, "digest": 9, "piece_words": 1 << 18}
SHARDS = (Bucket.of(0, ((0, 20), (64, 100))), Bucket.of(1, ((20, 64),)), Bucket.of(1, ((100, 192),)))
PATCH = Patch(base=(("c", 5),), tied=(("d", "c"),), scale=2.0)
PATCH_MAP = {"base": [["c", 5]], "tied": [["d", "c"]], "scale": 2.0}
PLACE = ChannelPlace(2, "127.0.0.1", 5, "run/1/2", rank=1, world_size=3, backend="gloo")
PLACE_MAP = {
    "group_epoch": 2,
    "store_host": "127.0.0.1",
    "store_port": 5,
    "prefix": "run/1/2",
    "rank": 1,
    "world_size": 3,
    "backend": "gloo",
}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"delta": DELTA}, {"delta": DELTA_MAP}),
        ({"patch": PATCH}, {"patch": PATCH_MAP}),
        ({"patch": Patch(()), "delta": DELTA}, {"patch": {"base": [], "tied": []}, "delta": DELTA_MAP}),
    ],
)
def test_an_offer_has_the_bytes_it_always_had(changes, more):
    offer = SyncOffer(1, 4, 0, PLACE, dataclasses.replace(MANIFEST, **changes), 60.0)
    body = msgpack.packb([1, 4, 0, PLACE_MAP, MANIFEST_MAP | more, 60.0])
    assert codec.encode_body(offer) == body
    assert codec.decode_body(SyncOffer, body) == offer


@pytest.mark.parametrize(("delta", "plain"), [(None, None), (DELTA, DELTA_MAP)])
def test_a_snapshot_has_the_bytes_it_always_had(delta, plain):
    ready = SnapshotReady(4, MANIFEST, [b"1234"], [b"5678"], 1.5, delta)
    body = msgpack.packb([4, MANIFEST_MAP, [b"1234"], [b"5678"], 1.5, plain])
    assert codec.encode_body(ready) == body
    assert codec.decode_body(SnapshotReady, body) == ready


def test_a_layout_of_several_senders_travels_with_their_pieces_and_the_delta_of_each():
    manifest = WeightManifest(4, dataclasses.replace(LAYOUT, ranges=(), shards=SHARDS), (1, 2, 3))
    assert manifest.layout.num_senders == 2 and manifest.layout.buckets == SHARDS
    assert list(SHARDS[0].places()) == [(0, 0, 20), (64, 64, 100)] and SHARDS[0].num_bytes == 100
    assert manifest.layout.bucket_bytes == 100
    delta = DeltaInfo(3, 108, 0, 1 << 18, (DeltaPayload(100, 9), DeltaPayload(8, -1)))
    offer = SyncOffer(
        1, 4, 0, dataclasses.replace(PLACE, num_senders=2), dataclasses.replace(manifest, delta=delta), 9.0
    )
    shards = [
        [0, struct.pack("<4q", 0, 20, 64, 100)],
        [1, struct.pack("<2q", 20, 64)],
        [1, struct.pack("<2q", 100, 192)],
    ]
    layout = MANIFEST_MAP["layout"] | {"buckets": [], "shards": shards}
    plain = MANIFEST_MAP | {
        "layout": layout,
        "digests": [1, 2, 3],
        "delta": DELTA_MAP | {"num_bytes": 108, "digest": 0, "shards": [[100, 9], [8, -1]]},
    }
    body = msgpack.packb([1, 4, 0, PLACE_MAP | {"num_senders": 2}, plain, 9.0])
    assert codec.encode_body(offer) == body
    assert codec.decode_body(SyncOffer, body) == offer
    assert offer.channel.spec(1.0).senders == 2 and LAYOUT.num_senders == PLACE.spec(1.0).senders == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": SHARDS}, "buckets without a sender"),
        ({"ranges": (), "shards": (*SHARDS, Bucket(1, b""))}, "buckets without a sender or without bytes"),
        ({"ranges": (), "shards": (*SHARDS, Bucket(1, b"12345678"))}, "table of 8 bytes is no list of pairs"),
        ({"ranges": (), "shards": SHARDS[:2]}, "buckets cover 100 of 192 bytes"),
        ({"ranges": (), "shards": (*SHARDS, SHARDS[1])}, r"bucket \[20, 64\) does not continue at byte 64"),
        ({"ranges": (), "shards": ()}, "buckets cover 0 of 192 bytes"),
    ],
)
def test_every_byte_is_sent_by_one_sender(change, says):
    with pytest.raises(ProtocolError, match=says):
        dataclasses.replace(LAYOUT, **change)


def test_the_pieces_of_a_large_model_on_many_ranks_fit_a_message():
    """723 tensors of 70 B parameters on 64 ranks, in buckets of 64 MiB."""
    ranks, rows = 64, 723 * 64
    pieces = [(row * ALIGNMENT, (row + 1) * ALIGNMENT) for row in range(rows)]
    shards = tuple(Bucket.of(rank, pieces[rank::ranks]) for rank in range(ranks))
    layout = WeightLayout(rows * ALIGNMENT, (), (), shards)
    offer = SyncOffer(1, 4, 0, PLACE, WeightManifest(4, layout, (0,) * ranks), 9.0)
    assert codec.decode_body(SyncOffer, codec.encode_body(offer)) == offer


def test_a_delta_has_a_payload_for_each_sender():
    layout = dataclasses.replace(LAYOUT, ranges=(), shards=SHARDS)
    with pytest.raises(ProtocolError, match="1 payloads, 2 senders"):
        WeightManifest(4, layout, (1, 2, 3), None, DELTA)
    with pytest.raises(ProtocolError, match="of another size together"):
        dataclasses.replace(DELTA, shards=(DeltaPayload(1, 1),))
    with pytest.raises(ProtocolError, match="cannot have 4 senders"):
        dataclasses.replace(PLACE, num_senders=4).spec(5.0)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"buckets": [[0, 128]]}, "buckets cover 128 of 192 bytes"),
        ({"buckets": [[0, 128], [64, 192]]}, r"bucket \[64, 192\) does not continue at byte 128"),
        ({"tensors": [["a", "float31", [1], 0]]}, "tensor a: dtype 'float31' is not one of"),
        ({"tensors": [["a", "int8", [1], 1]]}, r"tensor a: shape \(1,\) at offset 1 is not valid"),
        ({"tensors": [["a", "int64", [25], 0]]}, "tensor a ends at byte 200, the buffer has 192"),
    ],
)
def test_a_layout_that_does_not_fit_together_is_refused_when_it_is_decoded(layout, says):
    manifest = MANIFEST_MAP | {"layout": MANIFEST_MAP["layout"] | layout}
    with pytest.raises(FrameError, match=rf"SyncOffer.manifest.layout is wrong: {says}"):
        codec.decode_body(SyncOffer, msgpack.packb([1, 4, 0, PLACE_MAP, manifest, 60.0]))


def test_a_manifest_has_a_digest_for_each_bucket():
    with pytest.raises(FrameError, match="SyncOffer.manifest is wrong: weight manifest has 1 digests for 2 buckets"):
        codec.decode_body(SyncOffer, msgpack.packb([1, 4, 0, PLACE_MAP, MANIFEST_MAP | {"digests": [1]}, 60.0]))


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": -1}, {"world_size": 1}])
def test_a_place_outside_the_channel_cannot_be_joined(change):
    assert PLACE.spec(5.0) == ChannelSpec("127.0.0.1", 5, "run/1/2", 1, 3, "gloo", 5.0)
    with pytest.raises(ProtocolError, match="out of range"):
        dataclasses.replace(PLACE, **change).spec(5.0)
    with pytest.raises(ProtocolError, match="timeout_s 0.0 above 0"):
        PLACE.spec(0.0)

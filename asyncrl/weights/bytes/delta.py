"""One policy version as its difference to another: only the words that changed, lossless.

At the learning rates of reinforcement learning a step changes a few per cent of the bfloat16 weights: an update below
half a unit in the last place is rounded away (PULSE, arXiv 2602.03839). A delta holds what did change. It works on the
words of two flat staging buffers of one layout, integers of the elements' size: -0.0 and 0.0 differ, a NaN is a word
like any other, and no arithmetic on floats takes place.

Every tensor is cut into pieces, and each piece takes what makes it smallest: nothing, all of its new words, or changed
words with their places, which are a bitmap or the numbers of equal words in between in one or two bytes. A change is
(new - old) modulo the word size. It usually fits half a word; a change that does not leaves a mark there and goes,
whole, into a list of escapes.

    payload   table, then the streams of each piece; every part starts at a multiple of 8 bytes
    table     int32 [pieces, 4]: places, entries, escapes, whether changes take half a word
    streams   places, changes, escapes (or the new words alone)

Where several senders hold the policy, each encodes the words in its own buffer. A receiver, which has the flat buffer,
applies all payloads, each to its sender's words.

Applying costs O(changed). That the result is the version is proven elsewhere, by digests of the whole buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from asyncrl.errors import ChannelError, ProtocolError, ShapeError
from asyncrl.link.weight_records import DeltaInfo, DeltaPayload, WeightLayout
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import local_bytes, runs_of

MAX_SHARE = 0.5  # of the dense bytes; a delta that saves less is not worth the work at both ends
# Words of one piece. On a CPU old and new words and what compares them stay in a core's cache; on a GPU each piece
# waits for the device a few times.
PIECE_WORDS = {"cpu": 1 << 18, "cuda": 1 << 24}
SAMPLE_RUNS, SAMPLE_RUN_WORDS = 1024, 64
_ALIGNMENT = 8
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALVES = {2: torch.int8, 4: torch.int16, 8: torch.int32}


class Places(IntEnum):
    """How a piece says which of its words changed. The values travel."""

    NONE = 0
    ALL = 1
    BITMAP = 2
    GAPS_1 = 3
    GAPS_2 = 4


_GAP_BITS = {Places.GAPS_1: 8, Places.GAPS_2: 16}


@dataclass(frozen=True, slots=True)
class Delta:
    """An encoded difference: what a receiver must know of it, and its bytes."""

    info: DeltaInfo
    payload: torch.Tensor  # uint8 [info.num_bytes]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of words of one tensor in a buffer."""

    start: int  # bytes
    stop: int
    word_bytes: int

    def words(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.stop].view(_WORDS[self.word_bytes])


@torch.no_grad()
def encode_delta(
    layout: WeightLayout,
    old: torch.Tensor,
    new: torch.Tensor,
    base_version: int,
    *,
    max_share: float = MAX_SHARE,
    piece_words: int | None = None,
    sender: int = 0,
) -> Delta | None:
    """The difference from `old` to `new`; None when it takes more than `max_share` of the dense bytes.

    Reads both buffers once, in pieces that fit a core's cache.

    Args:
        layout: of both buffers.
        old: uint8 [local_bytes(layout, sender)]; the padding between tensors is zero.
        new: the same for the version to encode, on the same device.
        base_version: the policy version in `old`.
        max_share: of the dense bytes, above which there is no delta.
        piece_words: None = what suits the device.
        sender: whose buffers these are; a single sender's are the flat buffer.
    """
    dense_bytes = local_bytes(layout, sender)
    _check_buffers(dense_bytes, old, new)
    piece_words = piece_words or PIECE_WORDS.get(new.device.type, 1 << 18)
    pieces = list(_pieces(layout, sender, piece_words, local=True))
    rows: list[tuple[int, int, int, int]] = []
    streams: list[torch.Tensor] = []
    budget = int(max_share * dense_bytes) - 16 * len(pieces)
    for piece in pieces:
        row, parts = _encode_piece(piece.words(old), piece.words(new))
        budget -= sum(map(_padded_bytes, parts))
        if budget < 0:
            return None
        rows.append(row)
        streams += parts
    table = torch.tensor(rows, dtype=torch.int32, device=new.device).view(-1, 4)  # also of a sender without tensors
    payload = _join([table, *streams])
    return Delta(DeltaInfo(base_version, payload.numel(), digest(payload), piece_words), payload)


def join_deltas(deltas: Sequence[DeltaInfo]) -> DeltaInfo:
    """What a receiver must know of the deltas of all senders, given in the order of ranks."""
    first = deltas[0]
    if len(deltas) == 1:
        return first
    payloads = tuple(DeltaPayload(delta.num_bytes, delta.digest) for delta in deltas)
    return DeltaInfo(first.base_version, sum(each.num_bytes for each in payloads), 0, first.piece_words, payloads)


def delta_sizes(delta: DeltaInfo, most_bytes: int) -> list[tuple[int, int]]:
    """(bytes, sender) of each part of `delta_parts`."""
    return [
        (min(most_bytes, payload.num_bytes - start), sender)
        for sender, payload in enumerate(delta.payloads)
        for start in range(0, payload.num_bytes, most_bytes)
    ]


def delta_parts(payloads: Sequence[torch.Tensor], most_bytes: int) -> tuple[list[torch.Tensor], list[int]]:
    """(parts, sender of each): how the payloads of all senders are sent, in parts of `most_bytes` at most."""
    parts: list[torch.Tensor] = []
    senders: list[int] = []
    for sender, payload in enumerate(payloads):
        own = payload.split(most_bytes) if payload.numel() else ()
        parts += own
        senders += [sender] * len(own)
    return parts, senders


@torch.no_grad()
def apply_delta(layout: WeightLayout, flat: torch.Tensor, info: DeltaInfo, payloads: Sequence[torch.Tensor]) -> None:
    """Makes of the base version in `flat`, in place, the version that the payloads of all senders lead to.

    Raises:
        ChannelError: a payload was damaged on the way; `flat` is as it was.
        ProtocolError: a payload does not fit the layout; `flat` holds neither version now.
    """
    _check_buffers(layout.total_bytes, flat, flat)
    for sender, (payload, announced) in enumerate(zip(payloads, info.payloads, strict=True)):
        measured = digest(payload)
        if (payload.numel(), measured) != announced:
            raise ChannelError(
                f"delta from version {info.base_version}: {payload.numel()} bytes of sender {sender} with digest "
                f"{measured}, announced were {announced.num_bytes} with {announced.digest}; the bytes were damaged on "
                "the way"
            )
    for sender, payload in enumerate(payloads):
        _apply_payload(list(_pieces(layout, sender, info.piece_words, local=False)), flat, payload)


def _apply_payload(pieces: list[_Piece], flat: torch.Tensor, payload: torch.Tensor) -> None:
    reader = _Reader(payload)
    rows = reader.take(4 * len(pieces), torch.int32).view(-1, 4).tolist()
    for piece, (places, entries, escapes, halved) in zip(pieces, rows, strict=True):
        if places != Places.NONE:
            _apply_piece(piece.words(flat), reader, places, entries, escapes, bool(halved))
    reader.check_end()


@torch.no_grad()
def delta_pays(layout: WeightLayout, old: torch.Tensor, new: torch.Tensor, sender: int = 0) -> bool:
    """Whether a delta will probably save enough, from 64 k words of each buffer. Takes well under a millisecond.

    A layout of several element sizes is judged by the one that has the most bytes.
    """
    _check_buffers(local_bytes(layout, sender), old, new)
    bytes_of: dict[int, int] = {}
    for piece in _pieces(layout, sender, layout.total_bytes, local=True):
        bytes_of[piece.word_bytes] = bytes_of.get(piece.word_bytes, 0) + piece.stop - piece.start
    if not bytes_of:
        return False
    word = _WORDS[max(bytes_of, key=lambda size: bytes_of[size])]
    samples = [_sample(flat.view(word)) for flat in (old, new)]
    _, parts = _encode_piece(*samples)
    return sum(map(_padded_bytes, parts)) <= MAX_SHARE * samples[0].nbytes


def _sample(words: torch.Tensor) -> torch.Tensor:
    if words.numel() <= SAMPLE_RUNS * SAMPLE_RUN_WORDS:
        return words
    stride = words.numel() // SAMPLE_RUNS | 1  # odd, so that it does not meet the same columns of every matrix
    runs = words.numel() // stride
    return words[: runs * stride].view(runs, stride)[:, :SAMPLE_RUN_WORDS].reshape(-1)


def _pieces(layout: WeightLayout, sender: int, piece_words: int, *, local: bool) -> Iterator[_Piece]:
    """The tensors of `sender` in layout order, tied ones once, cut into runs of at most `piece_words` words.

    `local`: where they are in the sender's own buffer, else in the flat one.
    """
    for run in runs_of(layout, sender):
        word_bytes = run.entry.word_bytes
        first = run.local if local else run.start
        end = first + run.stop - run.start
        for start in range(first, end, piece_words * word_bytes):
            yield _Piece(start, min(start + piece_words * word_bytes, end), word_bytes)


# -- one piece ---------------------------------------------------------------------------------------------------------


def _encode_piece(old: torch.Tensor, new: torch.Tensor) -> tuple[tuple[int, int, int, int], list[torch.Tensor]]:
    """(row of the table, streams) of the smallest form."""
    places = _changed(old, new)
    count, num_words = places.numel(), new.numel()
    if not count:
        return (Places.NONE, 0, 0, 0), []
    changes, escapes = _halve(new.index_select(0, places) - old.index_select(0, places))
    gaps = places.clone()  # equal words before each that changed
    gaps[1:] -= places[:-1] + 1
    entries = {kind: count + int((gaps >> bits).sum()) for kind, bits in _GAP_BITS.items()}
    size = changes.element_size()
    costs = {
        Places.GAPS_1: entries[Places.GAPS_1] * (1 + size) + escapes.nbytes,
        Places.GAPS_2: entries[Places.GAPS_2] * (2 + size) + escapes.nbytes,
        Places.BITMAP: -(-num_words // 8) + count * size + escapes.nbytes,
        Places.ALL: new.nbytes,
    }
    kind = min(costs, key=lambda kind: costs[kind])
    if kind is Places.ALL:
        return (kind, num_words, 0, 0), [new]
    halved = int(changes.dtype != new.dtype)
    if kind is Places.BITMAP:
        return (kind, count, escapes.numel(), halved), [_to_bits(places, num_words), changes, escapes]
    codes, changes = _short_gaps(gaps, changes, _GAP_BITS[kind], entries[kind])
    codes = codes.to(torch.uint8 if kind is Places.GAPS_1 else torch.int16)
    return (kind, codes.numel(), escapes.numel(), halved), [codes, changes, escapes]


def _apply_piece(words: torch.Tensor, reader: _Reader, kind: int, entries: int, escapes: int, halved: bool) -> None:
    if kind == Places.ALL:
        words.copy_(reader.take(words.numel(), words.dtype))
        return
    if kind == Places.BITMAP:
        places = _from_bits(reader.take(-(-words.numel() // 8), torch.uint8), words.numel())
    elif kind == Places.GAPS_1:
        places = _to_places(reader.take(entries, torch.uint8).to(torch.int64))
    elif kind == Places.GAPS_2:
        places = _to_places(reader.take(entries, torch.int16).to(torch.int64).bitwise_and_(65535))
    else:
        raise ProtocolError(f"delta: a piece has places of unknown kind {kind}; both daemons must run one version")
    # Before the first word is touched: a place outside of the piece would be another tensor's.
    if places.numel() != entries or not entries or int(places[-1]) >= words.numel():
        raise ProtocolError(f"delta: {entries} changes do not fit a piece of {words.numel()} words")
    dtype = _HALVES.get(words.element_size(), words.dtype) if halved else words.dtype
    changes = reader.take(entries, dtype)
    whole = changes.to(words.dtype)
    escaped = reader.take(escapes, words.dtype)
    if escapes:
        (marked,) = torch.nonzero(changes == torch.iinfo(changes.dtype).min, as_tuple=True)
        if marked.numel() != escapes:
            raise ProtocolError(f"delta: {marked.numel()} changes are marked as escaped, {escapes} came")
        whole = whole.clone() if whole is changes else whole
        whole[marked] = escaped
    words.index_add_(0, places, whole)  # places are distinct; integers wrap


def _changed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Places of the words that differ, ascending, int64."""
    if new.device.type != "cpu":
        return torch.nonzero(old != new).view(-1)
    mask = old.numpy() != new.numpy()
    whole = mask.size // 8 * 8
    # Eight at a time first: most eights are equal throughout, and numpy compares much faster than torch on one core.
    eights = np.flatnonzero(mask[:whole].view(np.int64) != 0)  # of booleans: numpy has a fast path for them
    if eights.size * 2 > whole // 8:
        return torch.from_numpy(np.flatnonzero(mask))
    within = np.flatnonzero(mask[:whole].reshape(-1, 8)[eights])
    places = eights[within >> 3] * 8 + (within & 7)
    return torch.from_numpy(np.concatenate([places, np.flatnonzero(mask[whole:]) + whole]))


def _halve(changes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(changes, escapes): in half a word each where that is smaller, with what does not fit among the escapes."""
    half = _HALVES.get(changes.element_size())
    if half is not None:
        narrow = changes.to(half)
        mark = torch.iinfo(half).min
        (whole,) = torch.nonzero((narrow.to(changes.dtype) != changes) | (narrow == mark), as_tuple=True)
        if whole.numel() * 2 < changes.numel():
            narrow[whole] = mark
            return narrow, changes[whole]
    return changes, changes[:0]


def _short_gaps(
    gaps: torch.Tensor, changes: torch.Tensor, bits: int, entries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps below 2**bits: a longer one goes in several strides, all but the last of which change a word by zero."""
    if entries == gaps.numel():
        return gaps, changes
    lasts = torch.cumsum((gaps >> bits) + 1, 0) - 1
    codes = gaps.new_full((entries,), (1 << bits) - 1)
    codes[lasts] = gaps & ((1 << bits) - 1)
    spread = changes.new_zeros(entries)
    spread[lasts] = changes
    return codes, spread


def _to_places(gaps: torch.Tensor) -> torch.Tensor:
    return gaps.add_(1).cumsum(0).sub_(1)


def _to_bits(places: torch.Tensor, num_words: int) -> torch.Tensor:
    """One bit per word, the lowest bit of a byte first."""
    mask = torch.zeros(-(-num_words // 8) * 8, dtype=torch.uint8, device=places.device)
    mask[places] = 1
    eights = mask.view(-1, 8)
    bits = eights[:, 0].clone()
    for shift in range(1, 8):
        bits += eights[:, shift] << shift
    return bits


def _from_bits(bits: torch.Tensor, num_words: int) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = ((bits.unsqueeze(1) >> shifts) & 1).view(-1)[:num_words]
    return _changed(mask, torch.zeros_like(mask))


# -- bytes -------------------------------------------------------------------------------------------------------------


def _padded_bytes(part: torch.Tensor) -> int:
    return -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    payload = torch.zeros(sum(map(_padded_bytes, parts)), dtype=torch.uint8, device=parts[0].device)
    position = 0
    for part in parts:
        payload[position : position + part.nbytes].copy_(part.reshape(-1).view(torch.uint8))
        position += _padded_bytes(part)
    return payload


class _Reader:
    """Takes the parts of a payload in order."""

    def __init__(self, payload: torch.Tensor) -> None:
        if payload.numel() % _ALIGNMENT:
            raise ProtocolError(f"delta: {payload.numel()} bytes are no multiple of {_ALIGNMENT}")
        self._payload = payload
        self._position = 0

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The next `count` words, without a copy."""
        num_bytes = count * dtype.itemsize
        part = self._payload[self._position : self._position + num_bytes]
        if count < 0 or part.numel() != num_bytes:
            raise ProtocolError(f"delta: {count} words of {dtype} at byte {self._position} of {self._payload.numel()}")
        self._position += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype)

    def check_end(self) -> None:
        if self._position != self._payload.numel():
            raise ProtocolError(f"delta: {self._payload.numel()} bytes came, {self._position} were described")


def _check_buffers(num_bytes: int, old: torch.Tensor, new: torch.Tensor) -> None:
    for flat in (old, new):
        if flat.dtype != torch.uint8 or flat.numel() != num_bytes:
            raise ShapeError(
                f"delta: a buffer of {flat.numel()} elements of {flat.dtype}, the layout needs uint8 of {num_bytes}"
            )

"""Groups to micro-batches: numpy only, deterministic, and the same for any order of arrival.

A *row* of a micro-batch is one sequence of model inputs: a prompt and one completion, or a prompt and several
completions of it (`shared prompt`), each of which sees the prompt and itself. The last token of a completion
is never an input: nothing is predicted from it.

    plain row     p0 p1 p2 a0 a1 a2                   positions 0 1 2 3 4 5
    shared row    p0 p1 p2 a0 a1 a2 b0 b1             positions 0 1 2 3 4 5 3 4     segments 0 0 0 1 1 1 2 2

Rows are right-padded and sorted by length, so that a micro-batch wastes little; completion tokens are flat,
unpadded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asyncrl.errors import NonFiniteError, ProtocolError, ShapeError
from asyncrl.types import Group, Rollout

PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass: B rows of L inputs, padded, and their N completion tokens, flat.

    predictor is where the log-prob of a completion token is read off, in the flattened [B * L] inputs.
    policy_ages counts optimizer steps between the policy that sampled a token and the one being trained.
    """

    input_ids: np.ndarray  # int64 [B, L], right-padded with 0
    position_ids: np.ndarray | None  # int64 [B, L]; None in plain rows: 0, 1, 2, ...
    segment_ids: np.ndarray | None  # int64 [B, L]; None in plain rows; 0 prompt, 1.. completions, -1 padding
    predictor: np.ndarray  # int64 [N]
    token_ids: np.ndarray  # int64 [N]
    sequence_index: np.ndarray  # int64 [N], completion of this micro-batch, 0-based
    rollout_index: np.ndarray  # int64 [S], which rollout each completion is, counted over the packed groups
    behaviour_logprobs: np.ndarray  # float32 [N]
    token_versions: np.ndarray  # int64 [N]
    policy_ages: np.ndarray  # int64 [N]

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return len(self.token_ids)

    @property
    def padded_tokens(self) -> int:
        """What the forward pass costs: rows times the longest of them."""
        return self.input_ids.size

    def completion_mask(self) -> np.ndarray:
        """Inputs a log-prob is read off, bool [B, L]."""
        mask = np.zeros(self.input_ids.size, dtype=bool)
        mask[self.predictor] = True
        return mask.reshape(self.input_ids.shape)


@dataclass(frozen=True, slots=True)
class _Row:
    order: tuple[int, int, int]  # ordinal, attempt, index of its first rollout: makes the sort unique
    prompt: np.ndarray
    rollouts: list[Rollout]
    indices: list[int]  # of the rollouts, counted over the packed groups

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(rollout.num_tokens - 1 for rollout in self.rollouts)


def sorted_groups(groups: Iterable[Group]) -> list[Group]:
    """Groups in the canonical order, by ordinal and attempt: what is computed from them no longer depends on
    arrival.
    """
    return sorted(groups, key=lambda group: (group.key.kind, group.key.ordinal, group.key.attempt))


def pack_groups(
    groups: Sequence[Group],
    version: int,
    token_budget: int,
    *,
    shared_row_tokens: int = 0,
) -> list[MicroBatch]:
    """Lays out groups as micro-batches of at most `token_budget` padded inputs; a longer row gets one of its
    own.

    version            the learner's policy version, from which ages are counted
    shared_row_tokens  completions share their prompt in rows of up to this many inputs, where that saves a
    quarter
                       or more; 0 = never. Shared rows need a full attention mask, so they pay for short rows
                       only.

    Raises ShapeError when lengths do not fit or spans do not cover a rollout, NonFiniteError on a log-prob that
    is NaN or infinite, ProtocolError when a token is newer than the learner.
    """
    assert token_budget > 0, token_budget
    plain: list[_Row] = []
    shared: list[_Row] = []
    first = 0
    for group in groups:
        check_group(group, version)
        rows = _rows(group, first, shared_row_tokens)
        first += len(group.rollouts)
        (shared if len(rows) < len(group.rollouts) else plain).extend(rows)
    batches = []
    for rows, is_shared in ((plain, False), (shared, True)):
        rows.sort(key=lambda row: (-row.length, row.order))
        batches += [_micro_batch(chunk, version, is_shared) for chunk in _chunks(rows, token_budget)]
    return batches


def check_group(group: Group, version: int) -> None:
    """Refuses a group that cannot be trained on; what is raised when, see `pack_groups`."""
    where = f"group ({group.key.kind}, ordinal {group.key.ordinal}, attempt {group.key.attempt})"
    if len(group.prompt_token_ids) == 0:
        raise ShapeError(f"{where} has an empty prompt: nothing predicts its first token")
    for index, rollout in enumerate(group.rollouts):
        _check_rollout(rollout, version, where, index)


def _check_rollout(rollout: Rollout, version: int, where: str, index: int) -> None:
    num_tokens = rollout.num_tokens
    if num_tokens == 0 or len(rollout.behaviour_logprobs) != num_tokens:
        raise ShapeError(
            f"rollout {index} of {where} has {num_tokens} tokens and"
            f" {len(rollout.behaviour_logprobs)} log-probs; it needs as many of"
            " one as of the other, and at least one"
        )
    if not np.isfinite(rollout.behaviour_logprobs).all():
        raise NonFiniteError(f"rollout {index} of {where} has behaviour log-probs that are NaN or infinite")
    covered = 0
    for span in rollout.version_spans:
        if span.start != covered or span.stop <= span.start:
            break
        covered = span.stop
        if span.version > version:
            raise ProtocolError(
                f"rollout {index} of {where} has tokens of version {span.version}, but the learner holds {version}"
            )
    else:
        if covered == num_tokens:
            return
    spans = [(span.start, span.stop) for span in rollout.version_spans]
    raise ShapeError(f"rollout {index} of {where}: version spans {spans} do not cover [0, {num_tokens}) in order")


def _rows(group: Group, first: int, shared_row_tokens: int) -> list[_Row]:
    """The rows of one group: shared where they fit and save a quarter of the inputs, else one per rollout.

    `first` is the index of the group's first rollout.
    """
    plain = [
        _Row(
            (group.key.ordinal, group.key.attempt, index),
            group.prompt_token_ids,
            [rollout],
            [first + index],
        )
        for index, rollout in enumerate(group.rollouts)
    ]
    if shared_row_tokens <= 0 or len(plain) < 2:
        return plain
    # Shortest first: similar lengths share a row, so that few rows end up with room to spare.
    shared: list[_Row] = []
    for row in sorted(plain, key=lambda row: (row.length, row.order)):
        if shared and shared[-1].length + row.rollouts[0].num_tokens - 1 <= shared_row_tokens:
            shared[-1].rollouts.extend(row.rollouts)
            shared[-1].indices.extend(row.indices)
        else:
            shared.append(_Row(row.order, row.prompt, list(row.rollouts), list(row.indices)))
    saves = sum(row.length for row in shared) <= 0.75 * sum(row.length for row in plain)
    return shared if saves else plain


def _chunks(rows: list[_Row], token_budget: int) -> Iterable[list[_Row]]:
    """Cuts rows, longest first, so that count times longest stays within the budget."""
    start = 0
    while start < len(rows):
        count = max(1, token_budget // rows[start].length)
        yield rows[start : start + count]
        start += count


def _micro_batch(rows: list[_Row], version: int, is_shared: bool) -> MicroBatch:
    width = max(row.length for row in rows)
    pieces: list[np.ndarray] = []  # prompts and completions without their last token, in row order
    layout: list[tuple[int, int, int, int]] = []  # of each piece: length, place in [B * L], first position, segment
    reads: list[tuple[int, int, int]] = []  # of each completion: length, predictor of its first token, of its second
    for row_number, row in enumerate(rows):
        prompt_length = len(row.prompt)
        place = row_number * width
        pieces.append(row.prompt)
        layout.append((prompt_length, place, 0, 0))
        last_of_prompt = place + prompt_length - 1
        place += prompt_length
        for segment, rollout in enumerate(row.rollouts, start=1):
            pieces.append(rollout.token_ids[:-1])
            layout.append((rollout.num_tokens - 1, place, prompt_length, segment))
            reads.append((rollout.num_tokens, last_of_prompt, place))
            place += rollout.num_tokens - 1
    lengths, places, positions, segments = np.array(layout, dtype=np.int64).T
    inside = _ramps(lengths)
    flat = np.repeat(places, lengths) + inside
    shape = (len(rows), width)
    return MicroBatch(
        input_ids=_scatter(shape, flat, np.concatenate(pieces), 0),
        position_ids=_scatter(shape, flat, np.repeat(positions, lengths) + inside, 0) if is_shared else None,
        segment_ids=_scatter(shape, flat, np.repeat(segments, lengths), PADDING_SEGMENT) if is_shared else None,
        **_completion_tokens(rows, np.array(reads, dtype=np.int64), version),
    )


def _completion_tokens(rows: list[_Row], reads: np.ndarray, version: int) -> dict[str, np.ndarray]:
    rollouts = [rollout for row in rows for rollout in row.rollouts]
    lengths, first, second = reads.T
    inside = _ramps(lengths)
    predictor = np.where(inside == 0, np.repeat(first, lengths), np.repeat(second, lengths) + inside - 1)
    spans = [span for rollout in rollouts for span in rollout.version_spans]
    versions = np.repeat(
        np.array([span.version for span in spans], dtype=np.int64), [span.stop - span.start for span in spans]
    )
    return {
        "predictor": predictor,
        "token_ids": np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int64),
        "sequence_index": np.repeat(np.arange(len(rollouts), dtype=np.int64), lengths),
        "rollout_index": np.array([index for row in rows for index in row.indices], dtype=np.int64),
        "behaviour_logprobs": np.concatenate([r.behaviour_logprobs for r in rollouts]).astype(np.float32),
        "token_versions": versions,
        "policy_ages": version - versions,
    }


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """0 1 2 ... for each length, one after the other: (2, 3) -> (0, 1, 0, 1, 2)."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)


def _scatter(shape: tuple[int, int], places: np.ndarray, values: np.ndarray, padding: int) -> np.ndarray:
    out = np.full(shape[0] * shape[1], padding, dtype=np.int64)
    out[places] = values
    return out.reshape(shape)

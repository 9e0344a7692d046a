"""Groups to micro-batches: numpy only, deterministic, and the same for any order of arrival.

A *row* of a micro-batch is one sequence of model inputs: a prompt and one completion, or a prompt and several
completions of it (a *shared row*), each of which sees the prompt and itself. The last token of a completion
is never an input: nothing is predicted from it.

    plain row     p0 p1 p2 a0 a1 a2                   positions 0 1 2 3 4 5
    shared row    p0 p1 p2 a0 a1 a2 b0 b1             positions 0 1 2 3 4 5 3 4     segments 0 0 0 1 1 1 2 2

Rows lie flat, one after the other, without padding, and so do completion tokens. Rows are sorted by length, so that
those of one length are neighbours: an engine may attend to them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asyncrl.errors import NonFiniteError, ProtocolError, ShapeError
from asyncrl.types import FinishReason, Group, Rollout, VersionSpan


@dataclass(frozen=True, slots=True)
class Rows:
    """What a model is given: T inputs in B rows, one row after the other, and the N completion tokens asked for."""

    input_ids: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T], from 0 in each row
    lengths: np.ndarray  # int64 [B], inputs of each row; they add up to T
    segment_ids: np.ndarray | None  # int64 [T] in shared rows: 0 prompt, 1.. completions; None in plain rows
    predictor: np.ndarray  # int64 [N], the input that each completion token is predicted from
    token_ids: np.ndarray  # int64 [N]

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return len(self.token_ids)

    @property
    def num_inputs(self) -> int:
        """Tokens that the model computes."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward and backward pass, and what is known of their N tokens and S completions.

    A policy age counts optimizer steps between the policy that sampled a token and the one being trained.
    """

    rows: Rows
    sequence_index: np.ndarray  # int64 [N], completion of this micro-batch, 0-based
    rollout_index: np.ndarray  # int64 [S], which rollout each completion is, counted over all groups
    behaviour_logprobs: np.ndarray  # float32 [N]
    policy_ages: np.ndarray  # int64 [N]
    is_dummy: bool = False  # takes part in the passes, so that all ranks make as many, and counts nowhere


@dataclass(frozen=True, slots=True)
class _Row:
    order: tuple[int, int, int]  # ordinal, attempt, index of its first rollout: makes the sort unique
    prompt: np.ndarray
    rollouts: list[Rollout]
    rollout_indices: list[int]  # counted over the packed groups

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(rollout.num_tokens - 1 for rollout in self.rollouts)


def sorted_groups(groups: Iterable[Group]) -> list[Group]:
    """Groups in the canonical order, by ordinal and attempt, so that nothing depends on their order of arrival."""
    return sorted(groups, key=lambda group: (group.key.kind, group.key.ordinal, group.key.attempt))


def pack_groups(
    groups: Sequence[Group],
    version: int,
    token_budget: int,
    *,
    shared_row_tokens: int = 0,
) -> list[MicroBatch]:
    """Lays out groups as micro-batches of at most `token_budget` inputs.

    version            the trainer's policy version, from which ages are counted
    token_budget       a row that is longer than this gets a micro-batch of its own
    shared_row_tokens  completions share their prompt in rows of up to this many inputs, where that saves a tenth or
                       more; 0 = never

    `rollout_index` of the micro-batches counts over `groups`.

    Raises ShapeError when lengths do not fit or version spans do not cover a rollout, NonFiniteError on a log-prob
    that is NaN or infinite, ProtocolError when a token is newer than the trainer's policy.
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


def plain_rows(sequences: Sequence[Sequence[int] | np.ndarray]) -> Rows:
    """Sequences of two tokens or more as rows, in their order; every token but the first is asked for."""
    return _sequence_rows(sequences, copies=1)


def doubled_rows(sequences: Sequence[Sequence[int] | np.ndarray]) -> Rows:
    """Sequences of two tokens or more in shared rows: the first token is the prompt, what follows stands there twice.

    What a model makes of the second copy shows whether shared rows are the same to it as plain ones.

    Example: (7, 1, 2) -> inputs 7 1 1, segments 0 1 2, and the tokens 1 2 1 2 are asked for.
    """
    return _sequence_rows(sequences, copies=2)


def _sequence_rows(sequences: Sequence[Sequence[int] | np.ndarray], *, copies: int) -> Rows:
    lengths = [len(tokens) for tokens in sequences]
    if not lengths or min(lengths) < 2:
        raise ShapeError(f"sequences to score need at least 2 tokens; got lengths {lengths}")
    rows = []
    for index, sequence in enumerate(sequences):
        tokens = np.asarray(sequence, dtype=np.int32)
        spans = (VersionSpan(0, len(tokens) - 1, 0),)
        logprobs = np.zeros(len(tokens) - 1, dtype=np.float32)
        rollout = Rollout(tokens[1:], logprobs, spans, FinishReason.LENGTH, reward=0.0)
        rollouts = [copies * index + copy for copy in range(copies)]
        rows.append(_Row((0, 0, index), tokens[:1], [rollout] * copies, rollouts))
    return _micro_batch(rows, 0, copies > 1).rows


def check_group(group: Group, version: int) -> None:
    """Refuses a group that cannot be trained on; raises what `pack_groups` raises."""
    where = f"group ({group.key.kind}, ordinal {group.key.ordinal}, attempt {group.key.attempt})"
    if len(group.prompt_token_ids) == 0:
        raise ShapeError(f"{where} has an empty prompt: nothing predicts its first token")
    for index, rollout in enumerate(group.rollouts):
        _check_rollout(rollout, version, where, index)


def _check_rollout(rollout: Rollout, version: int, where: str, index: int) -> None:
    num_tokens = rollout.num_tokens
    if num_tokens == 0 or len(rollout.behaviour_logprobs) != num_tokens:
        raise ShapeError(
            f"rollout {index} of {where} has {num_tokens} tokens and {len(rollout.behaviour_logprobs)} log-probs; "
            "it needs as many log-probs as tokens, and at least one"
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
                f"rollout {index} of {where} has tokens of version {span.version}, but the trainer holds {version}"
            )
    else:
        if covered == num_tokens:
            return
    spans = [(span.start, span.stop) for span in rollout.version_spans]
    raise ShapeError(f"rollout {index} of {where}: version spans {spans} do not cover [0, {num_tokens}) in order")


def _rows(group: Group, first: int, shared_row_tokens: int) -> list[_Row]:
    """The rows of one group: shared where they fit and save a tenth of the inputs, else one per rollout.

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
            shared[-1].rollout_indices.extend(row.rollout_indices)
        else:
            shared.append(_Row(row.order, row.prompt, list(row.rollouts), list(row.rollout_indices)))
    saves = sum(row.length for row in shared) <= 0.9 * sum(row.length for row in plain)
    return shared if saves else plain


def _chunks(rows: list[_Row], token_budget: int) -> Iterable[list[_Row]]:
    """Cuts rows so that the inputs of each part stay within the budget."""
    chunk: list[_Row] = []
    inputs = 0
    for row in rows:
        if chunk and inputs + row.length > token_budget:
            yield chunk
            chunk, inputs = [], 0
        chunk.append(row)
        inputs += row.length
    if chunk:
        yield chunk


def _micro_batch(rows: list[_Row], version: int, is_shared: bool) -> MicroBatch:
    pieces: list[np.ndarray] = []  # prompts and completions without their last token, in row order
    layout: list[tuple[int, int, int]] = []  # of each piece: length, first position, segment
    reads: list[tuple[int, int, int]] = []  # of each completion: length, predictor of its first token, of its second
    place = 0
    for row in rows:
        prompt_length = len(row.prompt)
        pieces.append(row.prompt)
        layout.append((prompt_length, 0, 0))
        place += prompt_length
        last_of_prompt = place - 1
        for segment, rollout in enumerate(row.rollouts, start=1):
            pieces.append(rollout.token_ids[:-1])
            layout.append((rollout.num_tokens - 1, prompt_length, segment))
            reads.append((rollout.num_tokens, last_of_prompt, place))
            place += rollout.num_tokens - 1
    lengths, positions, segments = np.array(layout, dtype=np.int64).T
    rollouts = [rollout for row in rows for rollout in row.rollouts]
    token_counts = np.array([rollout.num_tokens for rollout in rollouts], dtype=np.int64)
    return MicroBatch(
        rows=Rows(
            input_ids=np.concatenate(pieces).astype(np.int64),
            position_ids=np.repeat(positions, lengths) + _ramps(lengths),
            lengths=np.array([row.length for row in rows], dtype=np.int64),
            segment_ids=np.repeat(segments, lengths) if is_shared else None,
            predictor=_predictors(np.array(reads, dtype=np.int64)),
            token_ids=np.concatenate([rollout.token_ids for rollout in rollouts]).astype(np.int64),
        ),
        sequence_index=np.repeat(np.arange(len(rollouts), dtype=np.int64), token_counts),
        rollout_index=np.array([index for row in rows for index in row.rollout_indices], dtype=np.int64),
        behaviour_logprobs=np.concatenate([rollout.behaviour_logprobs for rollout in rollouts]).astype(np.float32),
        policy_ages=version - np.concatenate([rollout.token_versions() for rollout in rollouts]),
    )


def _predictors(reads: np.ndarray) -> np.ndarray:
    """Where each completion token is predicted, int64 [N].

    reads  int64 [S, 3]: of each completion its tokens, the predictor of its first token, and that of its second; the
           others follow the second one by one
    """
    lengths, first, second = reads.T
    inside = _ramps(lengths)
    return np.where(inside == 0, np.repeat(first, lengths), np.repeat(second, lengths) + inside - 1)


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """0 1 2 ... for each length, one after the other: (2, 3) -> (0, 1, 0, 1, 2)."""
    starts = np.cumsum(lengths) - lengths
    ramps: np.ndarray = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
    return ramps

"""Groups and leases to and from their messages, and the checks a group must pass before it is kept.

Arrays are views into the received bytes: nothing is copied.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from asyncrl.errors import ProtocolError
from asyncrl.link.messages import GroupResult, LeaseGrant, WireRollout
from asyncrl.types import (
    LOGPROB_DTYPE,
    TOKEN_DTYPE,
    Group,
    Lease,
    LeaseKey,
    Rollout,
    VersionSpan,
    reward_parts_problem,
    reward_problem,
    weighted_sum,
)

# A log-prob above 0 by more than rounding, or below what any sampled token has, is garbage from the engine.
MAX_LOGPROB = 1e-6
MIN_LOGPROB = -1e4
# How far a reward may be from the weighted sum of its parts, as a share of the size of all terms of the sum.
REWARD_ROUNDING = 1e-9

_SPAN = struct.Struct("<3q")


def group_to_result(group: Group, seq: int, run_epoch: int, ticket: bytes = b"") -> GroupResult:
    """The message that carries `group`; `ticket` is that of its lease."""
    kind, ordinal, attempt = group.key
    return GroupResult(
        seq=seq,
        run_epoch=run_epoch,
        kind=kind,
        ordinal=ordinal,
        attempt=attempt,
        prompt=_raw(group.prompt_token_ids, TOKEN_DTYPE),
        rollouts=[_to_wire(rollout) for rollout in group.rollouts],
        baseline_reward=group.baseline_reward,
        ticket=ticket,
    )


def check_lengths(result: GroupResult, *, max_rollouts: int, max_new_tokens: int) -> None:
    """Raises ProtocolError when a result is larger than its lease can have asked for. To be called before
    `result_to_group`, which makes an object of every version span.
    """
    name = f"group {result.kind} {result.ordinal}"
    if len(result.rollouts) > max_rollouts:
        raise ProtocolError(f"{name}: {len(result.rollouts)} rollouts, at most {max_rollouts} were leased")
    for place, rollout in enumerate(result.rollouts):
        size = max(len(rollout.tokens) // TOKEN_DTYPE.itemsize, len(rollout.logprobs) // LOGPROB_DTYPE.itemsize)
        if size > max_new_tokens:
            raise ProtocolError(f"{name} rollout {place}: {size} tokens, at most max_new_tokens = {max_new_tokens}")
        if len(rollout.spans) // _SPAN.size > max(1, size):
            spans = len(rollout.spans) // _SPAN.size
            raise ProtocolError(f"{name} rollout {place}: {spans} version spans for {size} tokens")


def result_to_group(result: GroupResult) -> Group:
    """The group in `result`: right types, unchecked values (`validate_group` checks those).

    Raises ProtocolError.
    """
    name = f"group {result.kind} {result.ordinal}"
    return Group(
        key=_key_of(result),
        prompt_token_ids=_array(result.prompt, TOKEN_DTYPE, f"{name}: prompt"),
        rollouts=[_from_wire(rollout, f"{name} rollout {i}") for i, rollout in enumerate(result.rollouts)],
        baseline_reward=result.baseline_reward,
    )


def lease_to_grant(lease: Lease, run_epoch: int) -> LeaseGrant:
    """The message that carries `lease`."""
    kind, ordinal, attempt = lease.key
    return LeaseGrant(
        run_epoch=run_epoch,
        kind=kind,
        ordinal=ordinal,
        attempt=attempt,
        issued_version=lease.issued_version,
        deadline_s=lease.deadline_s,
        prompt=_raw(lease.prompt_token_ids, TOKEN_DTYPE),
        payload=lease.payload,
        num_rollouts=lease.num_rollouts,
        max_new_tokens=lease.max_new_tokens,
        temperature=lease.temperature,
        pinned_version=lease.pinned_version,
        seed=lease.seed,
        greedy_baseline=lease.greedy_baseline,
        ticket=lease.ticket,
        user_text=lease.user_text,
    )


def grant_to_lease(grant: LeaseGrant) -> Lease:
    """The lease in `grant`. Raises ProtocolError when it asks for what cannot be done."""
    name = f"lease {grant.kind} {grant.ordinal}"
    prompt = _array(grant.prompt, TOKEN_DTYPE, f"{name}: prompt")
    limits = (len(prompt), grant.num_rollouts, grant.max_new_tokens, grant.deadline_s)
    if min(limits) <= 0 or grant.temperature < 0:
        raise ProtocolError(
            f"{name}: prompt tokens, rollouts, max_new_tokens and deadline_s must be above 0, got {limits}; "
            f"temperature must not be negative, got {grant.temperature}"
        )
    return Lease(
        key=_key_of(grant),
        issued_version=grant.issued_version,
        deadline_s=grant.deadline_s,
        prompt_token_ids=prompt,
        payload=grant.payload,
        num_rollouts=grant.num_rollouts,
        max_new_tokens=grant.max_new_tokens,
        temperature=grant.temperature,
        pinned_version=grant.pinned_version,
        seed=grant.seed,
        greedy_baseline=grant.greedy_baseline,
        ticket=grant.ticket,
        user_text=grant.user_text,
    )


def validate_group(
    group: Group,
    *,
    vocab_size: int,
    prompt_token_ids: np.ndarray,
    num_rollouts: int,
    max_new_tokens: int,
    oldest_version: int,
    newest_version: int,
    pinned_version: int | None = None,
    greedy_baseline: bool = False,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Raises ProtocolError unless `group` is what its lease asked for and every number can be trained on.

    prompt_token_ids (int32 [P]), num_rollouts, max_new_tokens, pinned_version and greedy_baseline are those of
    the lease; versions of tokens must lie in [oldest_version, newest_version]. weights are those of the reward's
    parts, whose weighted sum the reward must be.
    """
    if not np.array_equal(group.prompt_token_ids, prompt_token_ids):
        raise _bad(group, f"prompt of {len(group.prompt_token_ids)} tokens is not the leased one")
    if len(group.rollouts) != num_rollouts:
        raise _bad(group, f"{len(group.rollouts)} rollouts, the lease asked for {num_rollouts}")
    _check_baseline(group, greedy_baseline)
    if pinned_version is not None:
        oldest_version = newest_version = pinned_version
    for index, rollout in enumerate(group.rollouts):
        _check_shape(group, index, rollout, max_new_tokens)
        _check_spans(group, index, rollout, oldest_version, newest_version)
        _check_reward(group, index, rollout, weights or {})
    # One pass over all tokens: negative ids are large as unsigned, and min and max carry a NaN through.
    tokens = np.concatenate([rollout.token_ids for rollout in group.rollouts]).view("<u4")
    logprobs = np.concatenate([rollout.behaviour_logprobs for rollout in group.rollouts])
    if not (logprobs.max() <= MAX_LOGPROB and logprobs.min() >= MIN_LOGPROB and tokens.max() < vocab_size):
        _blame(group, vocab_size)


def _check_baseline(group: Group, wanted: bool) -> None:
    baseline = group.baseline_reward
    if wanted and baseline is None:
        raise _bad(group, "no reward of a greedy completion, the lease asked for one")
    if not wanted and baseline is not None:
        raise _bad(group, f"a greedy completion with reward {baseline}, the lease asked for none")
    if baseline is not None and (problem := reward_problem(baseline, "greedy completion: reward")):
        raise _bad(group, problem)


def _check_reward(group: Group, index: int, rollout: Rollout, weights: Mapping[str, float]) -> None:
    parts = rollout.reward_parts
    if problem := reward_problem(rollout.reward) or reward_parts_problem(parts):
        raise _bad(group, problem, index)
    slack = REWARD_ROUNDING * sum(abs(weights.get(name, 1.0) * value) for name, value in parts.items())
    if not abs(rollout.reward - weighted_sum(parts, weights)) <= slack:
        raise _bad(
            group, f"the reward {rollout.reward} is not the weighted sum of its parts {parts}, weights {weights}", index
        )


def _check_shape(group: Group, index: int, rollout: Rollout, max_new_tokens: int) -> None:
    length = len(rollout.token_ids)
    if len(rollout.behaviour_logprobs) != length:
        raise _bad(group, f"{length} tokens but {len(rollout.behaviour_logprobs)} log-probs", index)
    if not 1 <= length <= max_new_tokens:
        raise _bad(group, f"{length} tokens, must be 1 to max_new_tokens = {max_new_tokens}", index)


def _check_spans(group: Group, index: int, rollout: Rollout, oldest: int, newest: int) -> None:
    stop, version = 0, oldest
    for span in rollout.version_spans:
        if span.start != stop or span.stop <= span.start or not version <= span.version <= newest:
            raise _bad(
                group,
                f"{span} after token {stop} of version {version}: spans must be contiguous, versions must "
                f"not fall and must lie in [{oldest}, {newest}]",
                index,
            )
        stop, version = span.stop, span.version
    if stop != len(rollout.token_ids):
        raise _bad(group, f"version spans cover {stop} of {len(rollout.token_ids)} tokens", index)


def _blame(group: Group, vocab_size: int) -> None:
    """Raises ProtocolError for the first bad token."""
    for index, rollout in enumerate(group.rollouts):
        logprobs, tokens = rollout.behaviour_logprobs, rollout.token_ids
        # Written so that a NaN is bad.
        bad = ~((logprobs <= MAX_LOGPROB) & (logprobs >= MIN_LOGPROB)) | (tokens < 0) | (tokens >= vocab_size)
        if bad.any():
            place = int(bad.argmax())
            raise _bad(
                group,
                f"token {place} has id {tokens[place]} and log-prob {logprobs[place]}: the id must be in "
                f"[0, {vocab_size}), the log-prob finite and in [{MIN_LOGPROB:g}, {MAX_LOGPROB:g}]",
                index,
            )
    raise AssertionError("a group was found bad but no token of it is")


def _bad(group: Group, what: str, index: int | None = None) -> ProtocolError:
    kind, ordinal, attempt = group.key
    rollout = "" if index is None else f" rollout {index}"
    return ProtocolError(f"group {kind} {ordinal} attempt {attempt}{rollout}: {what}")


def _key_of(message: GroupResult | LeaseGrant) -> LeaseKey:
    if message.ordinal < 0 or message.attempt < 0:
        raise ProtocolError(f"{message.key}: ordinal and attempt must not be negative")
    return message.key


def _to_wire(rollout: Rollout) -> WireRollout:
    return WireRollout(
        tokens=_raw(rollout.token_ids, TOKEN_DTYPE),
        logprobs=_raw(rollout.behaviour_logprobs, LOGPROB_DTYPE),
        spans=b"".join(_SPAN.pack(span.start, span.stop, span.version) for span in rollout.version_spans),
        finish=rollout.finish_reason,
        reward=float(rollout.reward),
        parts={name: float(part) for name, part in rollout.reward_parts.items()},
    )


def _from_wire(rollout: WireRollout, name: str) -> Rollout:
    if len(rollout.spans) % _SPAN.size:
        raise ProtocolError(f"{name}: spans of {len(rollout.spans)} bytes must come in rows of {_SPAN.size}")
    return Rollout(
        token_ids=_array(rollout.tokens, TOKEN_DTYPE, f"{name}: tokens"),
        behaviour_logprobs=_array(rollout.logprobs, LOGPROB_DTYPE, f"{name}: logprobs"),
        version_spans=tuple(VersionSpan(*row) for row in _SPAN.iter_unpack(rollout.spans)),
        finish_reason=rollout.finish,
        reward=rollout.reward,
        reward_parts=rollout.parts,
    )


def _raw(array: np.ndarray, dtype: np.dtype) -> bytes:
    return np.asarray(array, dtype=dtype).tobytes()


def _array(raw: bytes, dtype: np.dtype, name: str) -> np.ndarray:
    if len(raw) % dtype.itemsize:
        raise ProtocolError(f"{name} of {len(raw)} bytes: an array of {dtype} is a multiple of {dtype.itemsize} long")
    return np.frombuffer(raw, dtype=dtype)

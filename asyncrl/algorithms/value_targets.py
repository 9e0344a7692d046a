"""With a critic: per-token rewards, advantages and value targets, the loss of the values and how well they fit.

GAE and V-trace run backwards over time and take rows [B, T] with a mask (`layout.pad_sequences`); inside it the
completion tokens of a row lie side by side, outside it anything may stand, NaN included. A value is that of the state
before its token. After its last token a row has ended: value and advantage there are 0. Nothing is whitened here
(`advantages.whiten` does it), and advantages and targets carry no gradient: they are constants of the losses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from asyncrl.algorithms.corrections import MAX_LOG_RATIO, truncated_ratios
from asyncrl.algorithms.layout import sequence_lengths
from asyncrl.algorithms.logprobs import require_finite
from asyncrl.errors import ConfigError, ShapeError

VALUE_LOSSES = ("mse", "huber")


@torch.no_grad()
def token_rewards(rewards: Tensor, sequence_index: Tensor, penalties: Tensor | None = None) -> Tensor:
    """Reward of each token: that of the sequence at its last token, minus a penalty per token.

    Ziegler et al. 2019, eq. 2, and Ouyang et al. 2022, section 3.5, with the penalty beta * KL.

        r_t = 1[t is the last token] R - penalty_t

    rewards         [S], one per sequence
    sequence_index  [N] int64, see `layout.sequence_lengths`
    penalties       [N], to be subtracted: KL coefficient times KL estimate. None: no penalty

    Example: rewards (1, 0.5), sequences (0, 0, 1), penalties (0.1, 0.2, 0): (-0.1, 0.8, 0.5).

    Returns [N]. Raises ShapeError when shapes do not belong together or a sequence has no token (its reward would be
    lost), NonFiniteError on a reward or penalty that is NaN or infinite.
    """
    if rewards.dim() != 1:
        raise ShapeError(f"rewards must be [S]; got {tuple(rewards.shape)}")
    require_finite(rewards, "rewards")
    last_tokens = sequence_lengths(sequence_index, rewards.numel()).cumsum(0) - 1
    per_token = rewards.new_zeros(sequence_index.shape).index_copy(0, last_tokens, rewards)
    if penalties is None:
        return per_token
    if penalties.shape != sequence_index.shape:
        shapes = tuple(penalties.shape), tuple(sequence_index.shape)
        raise ShapeError(f"penalties and sequence_index must both be [N]; got {shapes}")
    require_finite(penalties, "penalties")
    return per_token - penalties


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over completion tokens.

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    All tokens are treated as if the policy being trained had sampled them. For older tokens there is `vtrace`.

    rewards, values  [B, T]; mask [B, T] bool, True on completion tokens. See the module's docstring

    Example: rewards (0, 0, 1), values (0.5, 0.5, 0.5), gamma = lam = 1: A = (0.5, 0.5, 0.5), returns (1, 1, 1).

    Returns (advantages, returns), both [B, T] and 0.0 outside the mask; verl whitens the advantages here. Raises
    ShapeError when shapes differ, NonFiniteError on a reward or value in the mask that is NaN or infinite.
    """
    rewards, values = _inside(mask, rewards=rewards, values=values)
    deltas = _one_step_errors(rewards, values, values, mask, gamma)
    advantages = _decayed_sums(deltas, torch.full_like(deltas, gamma * lam), mask)
    return advantages, advantages + values


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace targets and advantages from old rollouts.

    Espeholt et al. 2018: targets by eq. 1, lambda by remark 2, advantages by section 4.2.

    With rho_t = min(rho_bar, pi / mu) and c_t = lam min(c_bar, pi / mu) of token t, whose policy was mu:

        v_s = V_s + sum_{t >= s} gamma^(t-s) (c_s ... c_{t-1}) rho_t (r_t + gamma V_{t+1} - V_t)
        A_s = r_s + gamma v_{s+1} - V_s

    rho_bar says which policy the values belong to: with rho_bar = inf they are those of pi, with a small one those of
    a policy between mu and pi. c_bar says how far an error travels back: a large one learns faster, a small one has
    less variance. The paper wants c_bar <= rho_bar. On-policy, with both at least 1, v_s is the return of `gae` with
    the same lambda.

    The advantages come WITHOUT the paper's factor rho_s. The policy loss (`policy_losses`) multiplies them by its own
    truncated ratio pi / mu of the same token, which carries the gradient: with rho_s inside, the ratio would count
    twice. The ratios of later tokens are in v_{s+1}; no loss adds them. Before a loss that has no ratio, multiply the
    advantages by rho_s yourself.

    In A_s, v_{s+1} counts in full, as in the paper. rlax puts lam v_{s+1} + (1 - lam) V_{s+1} in its place, which
    on-policy gives GAE; those advantages are the ones of `importance_weighted_gae`. For lam = 1 they are the same.

    rewards, values  [B, T]; mask [B, T] bool. See the module's docstring
    log_ratios       [B, T] log pi - log mu, pi being the policy at the start of the step; held within +-20, so
                     that -inf is a ratio of nearly 0 and nothing overflows

    Example: rewards (0, 0, 1), values (0.5, 0.5, 0.5), ratios (2, 0.5, 0.5), all else 1: rho = c = (1, 0.5, 0.5),
    targets (0.625, 0.625, 0.75), advantages (0.125, 0.25, 0.5).

    Returns (advantages, targets), both [B, T] and 0.0 outside the mask. Raises ShapeError when shapes differ,
    NonFiniteError on a reward or value in the mask that is NaN or infinite, or a log-ratio that is NaN.
    """
    assert rho_bar > 0 and c_bar > 0, (rho_bar, c_bar)
    rewards, values, log_ratios = _inside(mask, rewards=rewards, values=values, log_ratios=log_ratios)
    deltas = _one_step_errors(rewards, values, values, mask, gamma)
    decays = gamma * lam * truncated_ratios(log_ratios, c_bar)
    targets = values + _decayed_sums(truncated_ratios(log_ratios, rho_bar) * deltas, decays, mask)
    return _one_step_errors(rewards, targets, values, mask, gamma), targets


@torch.no_grad()
def importance_weighted_gae(
    rewards: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """GAE over old rollouts: later errors count by the truncated ratios of the tokens in between.

    Munos et al. 2016, eq. 3 with the traces of Retrace(lambda), for advantages.

    With c_t = min(c_bar, pi / mu) of token t and delta_t as in `gae`:

        A_s = delta_s + gamma lam c_{s+1} A_{s+1}
            = sum_{t >= s} (gamma lam)^(t-s) (c_{s+1} ... c_t) delta_t
        target_s = V_s + c_s A_s

    On-policy, with c_bar at least 1, both are those of `gae`. As in Retrace, a token's own ratio is not in its
    advantage: A_s is about the very token that was sampled, and the policy loss weights it (see `vtrace`). The target
    does need it, because V_s is an average over the tokens of pi: with V_s + A_s the critic would learn the values of
    mu. So the targets are those of `vtrace` with rho_bar = c_bar, and the advantages

        A_s = r_s + gamma (lam target_{s+1} + (1 - lam) V_{s+1}) - V_s

    are the ones rlax takes for V-trace, but for its factor rho_s.

    Arguments as in `vtrace`.

    Example: rewards (0, 0, 1), values (0.5, 0.5, 0.5), ratios (2, 0.5, 0.5), all else 1: c = (1, 0.5, 0.5),
    advantages (0.125, 0.25, 0.5), targets (0.625, 0.625, 0.75).

    Returns (advantages, targets), both [B, T] and 0.0 outside the mask. Raises as `vtrace`.
    """
    assert c_bar > 0, c_bar
    rewards, values, log_ratios = _inside(mask, rewards=rewards, values=values, log_ratios=log_ratios)
    ratios = truncated_ratios(log_ratios, c_bar)
    deltas = _one_step_errors(rewards, values, values, mask, gamma)
    advantages = _decayed_sums(deltas, gamma * lam * _following(ratios), mask)
    return advantages, values + ratios * advantages


def value_loss(
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    *,
    clip: float | None = None,
    kind: str = "mse",
    huber_delta: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the critic per token, with PPO's value clip.

    Engstrom et al. 2020, "Implementation matters in deep policy gradients", section 3.

        l(v) = 0.5 (v - target)^2                                          mse
        l(v) = 0.5 e^2 where e = |v - target| <= delta, else delta (e - 0.5 delta)    huber
        loss = max(l(v), l(clip(v, old - clip, old + clip)))

    A value that has moved by more than `clip` towards its target gets no further gradient; one that has moved
    away from it, or past it, keeps the gradient that leads back. The clip is in units of the reward, as in
    verl and TRL: what is loose for rewards of 0 to 1 is tight for 0 to 10. None switches it off.

    values      [N] of the critic being trained; carries the gradient
    old_values  [N] of the critic at the start of the step, without gradient
    targets     [N] from `gae`, `vtrace` or `importance_weighted_gae`, without gradient
    kind        "mse" or "huber"

    Example: values (0.5, 1, 0.1), old (0.5, 0.5, 0.5), targets (1, 1, 1), clip 0.2: losses (0.125, 0.045, 0.405),
    gradients (-0.5, 0, -0.9).

    Returns (losses [N], sums). The sums are detached scalars that add up over micro-batches and ranks: value_tokens,
    value_clipped (tokens whose gradient the clip switched off), value_sum, value_error_square_sum (of value - target),
    target_sum and target_square_sum; `explained_variance_from_sums` reads them.

    Raises ShapeError on differing shapes, ConfigError for an unknown kind. Looks at no value (that would wait for the
    device): NaN stays NaN.
    """
    if kind not in VALUE_LOSSES:
        raise ConfigError(f"value loss {kind!r} is not one of {', '.join(VALUE_LOSSES)}")
    if not values.shape == old_values.shape == targets.shape or values.dim() != 1:
        shapes = tuple(values.shape), tuple(old_values.shape), tuple(targets.shape)
        raise ShapeError(f"values, old_values and targets must share one shape [N]; got {shapes}")
    assert clip is None or clip > 0, clip
    old_values, targets = old_values.detach(), targets.detach()
    losses = _distance(values, targets, kind, huber_delta)
    is_clipped = torch.zeros_like(values, dtype=torch.bool)
    if clip is not None:
        steps = values - old_values
        has_moved = steps.abs() > clip
        # Inside the bound the value itself, not old + step: rounding must not count as clipped.
        bounded = torch.where(has_moved, old_values + steps.clamp(-clip, clip), values)
        bounded_losses = _distance(bounded, targets, kind, huber_delta)
        is_clipped = has_moved & (bounded_losses > losses)
        losses = torch.maximum(losses, bounded_losses)
    return losses, _value_sums(values.detach(), targets, is_clipped)


def explained_variance_from_sums(sums: dict[str, float]) -> float:
    """Share of the variance of the targets that the values explain, 1 - Var[target - value] / Var[target].

    1: the values are the targets, up to a constant. 0: they are as good as a constant. Below 0: worse than a constant.

    sums  those of `value_loss`, added up over micro-batches and ranks, as numbers

    Example: values (0, 1, 1), targets (0, 1, 2): Var[target - value] = 2/9, Var[target] = 2/3 -> 2/3.

    Returns NaN without tokens, or where the targets do not vary: nothing was measured. Targets count as equal when
    their standard deviation is below a millionth of their size, which is as far as float32 tells values apart.
    """
    count = sums["value_tokens"]
    if not count:
        return math.nan
    mean_target = sums["target_sum"] / count
    mean_square = sums["target_square_sum"] / count
    target_variance = mean_square - mean_target**2
    if not target_variance > 1e-12 * mean_square:
        return math.nan
    mean_error = mean_target - sums["value_sum"] / count
    error_variance = sums["value_error_square_sum"] / count - mean_error**2
    return 1.0 - error_variance / target_variance


def _inside(mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """The tensors with 0 outside the mask and log-ratios within +-MAX_LOG_RATIO. Raises what `vtrace` raises."""
    shapes = [tuple(tensor.shape) for tensor in (*tensors.values(), mask)]
    if len(set(shapes)) > 1 or mask.dim() != 2:
        raise ShapeError(f"{', '.join(tensors)} and mask must share one shape [B, T]; got {tuple(shapes)}")
    kept = {name: torch.where(mask, tensor, 0.0) for name, tensor in tensors.items()}
    if "log_ratios" in kept:
        kept["log_ratios"] = kept["log_ratios"].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    for name, tensor in kept.items():
        require_finite(tensor, name)
    return list(kept.values())


def _following(rows: Tensor) -> Tensor:
    """Rows shifted by one token, [B, T]: column t holds what stood in t + 1, the last one 0."""
    return functional.pad(rows[:, 1:], (0, 1)) if rows.shape[1] else rows


def _one_step_errors(rewards: Tensor, next_values: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """r_t + gamma next_values_{t+1} - V_t inside the mask, 0 outside, [B, T]."""
    return torch.where(mask, rewards + gamma * _following(next_values) - values, 0.0)


def _decayed_sums(terms: Tensor, decays: Tensor, mask: Tensor) -> Tensor:
    """x_t = terms_t + decays_t x_{t+1} inside the mask, 0 outside, where terms are 0, too; [B, T]."""
    if not terms.numel():
        return torch.zeros_like(terms)
    decays = torch.where(mask, decays, 0.0).to(terms.dtype)
    # On the CPU wherever the rest is: one small step after the other, each of which would be a kernel on a GPU.
    columns = [rows.cpu().t().contiguous().unbind() for rows in (terms, decays)]
    following = torch.zeros_like(columns[0][0])
    sums = []
    for term, decay in zip(*map(reversed, columns), strict=True):
        following = torch.addcmul(term, decay, following)
        sums.append(following)
    return torch.stack(sums[::-1], dim=1).to(terms.device)


def _distance(values: Tensor, targets: Tensor, kind: str, huber_delta: float) -> Tensor:
    if kind == "huber":
        return functional.huber_loss(values, targets, reduction="none", delta=huber_delta)
    return 0.5 * (values - targets).square()


def _value_sums(values: Tensor, targets: Tensor, is_clipped: Tensor) -> dict[str, Tensor]:
    # Variances come from differences of these sums; float32 would lose them where values are far from 0.
    values, targets = values.double(), targets.double()
    return {
        "value_tokens": values.new_full((), float(values.numel())),
        "value_clipped": is_clipped.sum(dtype=values.dtype),
        "value_sum": values.sum(),
        "value_error_square_sum": (values - targets).square().sum(),
        "target_sum": targets.sum(),
        "target_square_sum": targets.square().sum(),
    }

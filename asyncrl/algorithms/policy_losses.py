"""Policy losses, one value per token. They are minimised; `losses.aggregate_loss` makes one number of them.

All of them take tokens flat, [N]. pi is the policy being trained; mu is the one the ratio r = pi / mu is taken
against, which is the policy that sampled the token or the proximal one of decoupled PPO.

    logprobs      [N] log pi; carries the gradient
    old_logprobs  [N] log mu, without gradient
    advantages    [N], without gradient; a whole completion shares one, or each token has its own
    loss_factors  [N] or None, without gradient: multiplies the losses. Correction weights and masks; 0 leaves a token
                  out
    clip_low, clip_high, ratio_cap   float, or [N] when older tokens get less room

They look at no value (that would wait for the device). Ratios are held below e^20, so log-ratios of any size, +-inf
too, give finite ratios. NaN stays NaN, even under a factor of 0: check inputs with `require_finite`. Where log pi is
-inf, the ratio of `ppo_clip_loss` and `gspo_loss` is 0; the others, and the token gradient of GSPO, need log pi itself
and give a loss that is not finite.

All raise ShapeError when shapes differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import log_importance_ratios, truncated_ratios
from asyncrl.algorithms.sequences import require_same_shape, sequence_means
from asyncrl.errors import ConfigError

GSPO_GRADIENTS = ("sequence", "token")


class PolicyLoss(NamedTuple):
    """What a policy loss returns for N tokens.

    is_clipped says where the loss's own bound acted on a token: its gradient is off (ppo_clip, gspo), or its weight is
    held at the bound (cispo, reinforce, topr). Loss factors do not count, nor does the cap of ppo_clip and gspo, which
    `losses.ratio_sums` counts.
    """

    losses: Tensor  # [N], with the gradient
    is_clipped: Tensor  # bool [N]


def ppo_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    ratio_cap: float | Tensor | None = None,
    dual_clip: float | None = None,
    loss_factors: Tensor | None = None,
) -> PolicyLoss:
    """PPO clipped surrogate (Schulman et al. 2017, eq. 7) with a truncated importance ratio, per token.

    With r_C = `truncated_ratios`(r, ratio_cap):

        loss = -min(1 + clip_high, C) A     where A > 0 and r > 1 + clip_high
             = -(1 - clip_low) A            where A < 0 and r < 1 - clip_low
             = -r_C A                       else
        A < 0, r > c and dual_clip = c:  loss = -min(c, C) A                  (Ye et al. 2020, eq. 5)

    All bounds are tested on r itself; the cap only weighs what they leave. So a cap below 1 + clip_high, as `age_cap`
    gives it for old tokens, switches neither the clip nor the dual clip off.

    How clip and cap share the work, as the weight of A * d log pi in the gradient:

                 r < 1 - clip_low      inside       r > 1 + clip_high
        A > 0        min(r, C)        min(r, C)             0
        A < 0            0            min(r, C)         min(r, C)     (dual clip: 0 from r = c on)

    PPO's clip is one-sided: for A < 0 it leaves the ratio unbounded above, and one stale token can own the gradient.
    The cap bounds it, and keeps the gradient.

    The ratio against the policy that sampled makes the clip a trust region around what was sampled. The ratio against
    the policy at the start of the step does not: with one optimizer step per batch it is 1 and clips nothing.

    Decoupled PPO (Hilton et al. 2021, eq. 8) is the same function: give the proximal log-probs as `old_logprobs` and
    sg(min(pi_prox / mu, C)) as `loss_factors`.

    In other projects: dual clip is always on in verl (c = 3), and off by default in AReaL and here; TRL's `delta` caps
    the unclipped ratio for either sign, which for A > 0 changes nothing above 1 + clip_high.

    Example: A = (1, -1, -1), r = (1.5, 0.5, 4), clip 0.2 / 0.2, cap 2: losses (-1.2, 0.8, 2), of which the bounds clip
    the first two.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratios = log_importance_ratios(logprobs, old_logprobs)
    losses, is_clipped = _clipped_surrogate(log_ratios, advantages, clip_low, clip_high, ratio_cap, dual_clip)
    return PolicyLoss(_scaled(losses, loss_factors), is_clipped)


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence_index: Tensor,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    ratio_cap: float | Tensor | None = None,
    loss_factors: Tensor | None = None,
    gradient: str = "sequence",
) -> PolicyLoss:
    """GSPO: PPO's clip on one ratio per sequence (Zheng et al. 2025, eqs. 5 and 7).

        s = exp(mean over the sequence of log r)        loss = max(-s A, -clip(s, 1 - clip_low, 1 + clip_high) A)

    sequence_index  [N] int64, see `sequences`
    ratio_cap       weighs by min(s, ratio_cap) as in `ppo_clip_loss`; the clip is tested on s itself
    gradient        "sequence": s is differentiated, so a token's loss moves all tokens of its sequence (eq. 10; TRL,
                    AReaL). "token": s_t = sg(s) pi_t / sg(pi_t), so a token's loss moves that token alone (GSPO-token,
                    eq. 14; verl). Their losses are always equal, their gradients as long as all tokens of a sequence
                    have one advantage and one loss factor

    A factor of 0 takes a token's loss out, not its part in s. The paper clips at 3e-4 / 4e-4 and averages by
    seq-mean-token-mean; with old rollouts such a clip silences most sequences, which is_clipped shows.

    Example: sequences (0, 0, 1), r = (0.5, 2, 1.5), A = 1, clip 0.2 / 0.2: s = (1, 1, 1.5),
    losses (-1, -1, -1.2), the third clipped.

    Raises ConfigError for an unknown gradient.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    mean_log_ratios = sequence_means(log_importance_ratios(logprobs, old_logprobs), sequence_index)
    if gradient == "token":
        mean_log_ratios = mean_log_ratios.detach() + (logprobs - logprobs.detach())
    elif gradient != "sequence":
        raise ConfigError(f"GSPO gradient {gradient!r} is not one of {', '.join(GSPO_GRADIENTS)}")
    losses, is_clipped = _clipped_surrogate(mean_log_ratios, advantages, clip_low, clip_high, ratio_cap, None)
    return PolicyLoss(_scaled(losses, loss_factors), is_clipped)


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor | None,
    clip_high: float | Tensor,
    loss_factors: Tensor | None = None,
) -> PolicyLoss:
    """CISPO: the clipped ratio is a weight, and every token keeps its gradient (MiniMax-M1 2025, eqs. 4 and 5).

        loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi

    clip_low  None for no floor, as MiniMax-M1 was trained and as TRL does it

    Bounds are distances from 1, as in verl and the paper: TRL's `epsilon_high` 5 is clip_high 4 here.

    Example: log pi = -1, A = (1, 1, -1), r = (0.5, 1, 8), clip_high 4. Without a floor: losses (0.5, 1, -5), the third
    clipped. With clip_low 0.2: (0.8, 1, -5), the first and the third clipped.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratios = truncated_ratios(log_importance_ratios(logprobs, old_logprobs).detach(), None)
    bounded = ratios.clamp(max=1.0 + clip_high)
    if clip_low is not None:
        bounded = bounded.clamp(min=1.0 - clip_low)
    is_clipped = (bounded < ratios) | (bounded > ratios)
    return PolicyLoss(_scaled(-bounded * advantages * logprobs, loss_factors), is_clipped)


def reinforce_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    ratio_cap: float | Tensor | None,
    importance: bool = True,
    loss_factors: Tensor | None = None,
) -> PolicyLoss:
    """REINFORCE (Williams 1992) with truncated importance weights.

    With a cap in [2, 10] it is AIPO (Wu et al. 2025, LlamaRL, 2505.24034).

        loss = -sg(min(r, ratio_cap)) A log pi
        loss = -A log pi                            without `importance`: old rollouts are taken for new ones

    ratio_cap  None truncates nothing (below e^20); not looked at without `importance`

    The bound is one-sided, as that of CISPO without a floor: a ratio below 1 already quiets its token.

    Example: log pi = -1, A = (1, 1, -1), r = (0.5, 1, 8), cap 5: losses (0.5, 1, -5), the third clipped.
    Without importance: (1, 1, -1).
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratios = log_importance_ratios(logprobs, old_logprobs).detach()
    if not importance:
        is_clipped = torch.zeros_like(log_ratios, dtype=torch.bool)
        return PolicyLoss(_scaled(-advantages * logprobs, loss_factors), is_clipped)
    truncated = truncated_ratios(log_ratios, ratio_cap)
    is_clipped = truncated < truncated_ratios(log_ratios, None)
    return PolicyLoss(_scaled(-truncated * advantages * logprobs, loss_factors), is_clipped)


def topr_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    loss_factors: Tensor | None = None,
) -> PolicyLoss:
    """TOPR: tapered off-policy REINFORCE (Le Roux et al. 2025, 2503.14286, the canonical form).

        A > 0   loss = -A log pi                       good completions count in full, however old they are
        else    loss = -sg(clip(r, 0, 1)) A log pi     bad ones fade as the policy leaves them behind

    The paper takes the ratio of the whole completion. Here it is the token's, as in ROLL, since a product over
    thousands of tokens is 0 or infinite.

    Example: log pi = -1, A = (1, -1, -1), r = (0.5, 0.5, 8): losses (1, -0.5, -1), the third clipped.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratios = log_importance_ratios(logprobs, old_logprobs).detach()
    is_good = advantages > 0
    tapered = torch.where(is_good, 1.0, truncated_ratios(log_ratios, 1.0))
    is_clipped = ~is_good & (log_ratios > 0)
    return PolicyLoss(_scaled(-tapered * advantages * logprobs, loss_factors), is_clipped)


def _clipped_surrogate(
    log_ratios: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    ratio_cap: float | Tensor | None,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Losses of `ppo_clip_loss`, and where its bounds switched the gradient off."""
    # What the bounds look at is the ratio as it is: one that the cap had lowered would never reach them.
    ratios = truncated_ratios(log_ratios.detach(), None)
    is_high = (advantages > 0) & (ratios > 1.0 + clip_high)
    is_low = (advantages < 0) & (ratios < 1.0 - clip_low)
    is_clipped = is_high | is_low
    # One bound at a time: torch.clamp takes two numbers or two tensors, not one of each.
    bounds = ratios.clamp(min=1.0 - clip_low).clamp(max=1.0 + clip_high)
    if dual_clip is not None:
        is_bounded = (advantages < 0) & (ratios > dual_clip)
        is_clipped = is_clipped | is_bounded
        bounds = torch.where(is_bounded, dual_clip, bounds)
    if ratio_cap is not None:  # or the loss would jump where the bound takes over
        bounds = bounds.clamp(max=ratio_cap)
    losses = -torch.where(is_clipped, bounds, truncated_ratios(log_ratios, ratio_cap)) * advantages
    return losses, is_clipped


def _scaled(losses: Tensor, loss_factors: Tensor | None) -> Tensor:
    if loss_factors is None:
        return losses
    require_same_shape(losses=losses, loss_factors=loss_factors)
    assert not loss_factors.requires_grad, "loss factors are constants of the loss"
    return losses * loss_factors

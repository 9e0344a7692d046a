"""Rules over the sections algorithm, critic and update: what does not fit together, and what is known to collapse."""

from __future__ import annotations

from collections.abc import Callable

from asyncrl.config import Config
from asyncrl.config.methods import KL_ESTIMATORS_BY_PLACE

RATIO_LOSSES = ("ppo_clip", "gspo", "cispo")  # losses with a clipped ratio, which may be against a proximal policy
COMPARING = ("group", "rloo", "reinforce_pp_baseline")  # advantages that compare rewards within the group
BOUNDING_MASKS = {"band", "sequence_band", "second_moment"}  # masks that keep ratios from growing without bound


def _groups_can_be_compared(config: Config) -> str | None:
    advantage, size = config.algorithm.advantage, config.sampling.group_size
    needs_two = advantage in COMPARING or config.algorithm.dynamic_sampling
    if size >= 2 or not needs_two:
        return None
    what = f"algorithm.advantage={advantage}" if advantage in COMPARING else "algorithm.dynamic_sampling=true"
    return (
        f"sampling.group_size={size} with {what} (algorithm.name={config.algorithm.name}): rewards are compared within "
        "a group, so a group of one teaches nothing; set sampling.group_size to 2 or more (8 is usual)"
    )


def _old_rollouts_are_corrected(config: Config) -> str | None:
    """A run that trains on old rollouts as if they were new goes well for some hundred steps, and then collapses."""
    if config.staleness.max_age == 0 or config.algorithm.i_know:
        return None
    problem = _missing_correction(config)
    if problem is None:
        return None
    return (
        f"staleness.max_age={config.staleness.max_age} with {problem}: asynchronous training without a correction is "
        "known to collapse; set algorithm.correction=tis, or staleness.max_age=0, or, to see it happen, "
        "algorithm.i_know=true"
    )


def _missing_correction(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.correction != "none" or algorithm.loss in ("cispo", "topr") and algorithm.proximal == "behaviour":
        return None
    if algorithm.proximal != "behaviour":
        if BOUNDING_MASKS & set(algorithm.masks):
            return None
        return f"algorithm.correction=none and algorithm.proximal={algorithm.proximal}, which ignores the age"
    if algorithm.loss == "reinforce":
        return "algorithm.correction=none and algorithm.loss=reinforce, which treats old rollouts as new"
    if algorithm.dual_clip > 0.0:
        return None
    return (
        f"algorithm.correction=none, algorithm.loss={algorithm.loss} and algorithm.dual_clip=0: the ratio of a bad "
        "token has no upper bound"
    )


def _proximal_fits_the_loss(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.proximal == "behaviour" or algorithm.loss in RATIO_LOSSES:
        return None
    return (
        f"algorithm.proximal={algorithm.proximal} with algorithm.loss={algorithm.loss}: its ratio is the importance "
        f"weight itself; set algorithm.proximal=behaviour, or algorithm.loss to one of {', '.join(RATIO_LOSSES)}"
    )


def _sequence_weights_count_once(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.correction != "sequence_tis" or algorithm.proximal != "behaviour" or algorithm.loss == "reinforce":
        return None
    return (
        f"algorithm.correction=sequence_tis with algorithm.loss={algorithm.loss} and algorithm.proximal=behaviour: the "
        "ratio of the loss corrects already, and both would count; set algorithm.correction=tis, or "
        "algorithm.proximal=recomputed"
    )


def _age_schedule_has_something_to_narrow(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.age_schedule == "clip" and algorithm.loss not in RATIO_LOSSES:
        return (
            f"algorithm.age_schedule=clip with algorithm.loss={algorithm.loss}, which has no clip; set "
            "algorithm.age_schedule=cap or none"
        )
    if algorithm.age_schedule == "cap" and (algorithm.correction != "tis" or algorithm.loss in ("cispo", "topr")):
        return (
            f"algorithm.age_schedule=cap with algorithm.correction={algorithm.correction} and "
            f"algorithm.loss={algorithm.loss}: there tis_cap is not used; set algorithm.age_schedule=none"
        )
    return None


def _dynamic_sampling_compares(config: Config) -> str | None:
    algorithm = config.algorithm
    if not algorithm.dynamic_sampling or algorithm.advantage in COMPARING:
        return None
    return (
        f"algorithm.dynamic_sampling=true with algorithm.advantage={algorithm.advantage}: there, groups of equal "
        f"rewards teach, too; set algorithm.dynamic_sampling=false, or algorithm.advantage to {' or '.join(COMPARING)}"
    )


def _kl_has_a_weight(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.kl_coef > 0.0 or (algorithm.kl_in == "loss" and algorithm.kl_target == 0.0):
        return None
    asked = "algorithm.kl_in=reward" if algorithm.kl_in == "reward" else f"algorithm.kl_target={algorithm.kl_target}"
    return f"{asked} with algorithm.kl_coef=0: there is no KL; set algorithm.kl_coef, 0.05 for example, to start from"


def _kl_has_its_gradient(config: Config) -> str | None:
    """An estimator with the right value may have another gradient, or none: what it would train is not the KL."""
    estimator, place = config.algorithm.kl_estimator, config.algorithm.kl_in
    fitting = KL_ESTIMATORS_BY_PLACE[place]
    if estimator == "auto" or estimator in fitting:
        return None
    if estimator == "abs":
        reason = "it is a distance, and in neither place has it the gradient of the KL"
    elif place == "loss":
        reason = "its gradient is 0 in expectation, so nothing would hold the policy near the reference"
    else:
        reason = "as a penalty its expected gradient is not that of the KL; it may even point away from the reference"
    return (
        f"algorithm.kl_estimator={estimator} with algorithm.kl_in={place}: {reason}; set algorithm.kl_estimator to "
        f"auto or {' or '.join(fitting)}"
    )


def _dual_clip_acts(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.dual_clip == 0.0:
        return None
    if algorithm.loss != "ppo_clip":
        return (
            f"algorithm.dual_clip={algorithm.dual_clip} with algorithm.loss={algorithm.loss}: only ppo_clip has a dual "
            "clip; set algorithm.dual_clip=0"
        )
    if algorithm.dual_clip <= 1.0:
        return (
            f"algorithm.dual_clip={algorithm.dual_clip} would switch off bad tokens that have not moved; set it above "
            "1 (3 is usual), or to 0 for none"
        )
    return None


def _mini_batches_have_groups(config: Config) -> str | None:
    parts, groups = config.learner.mini_batches, config.learner.groups_per_step
    if parts <= groups:
        return None
    return (
        f"learner.mini_batches={parts} of learner.groups_per_step={groups} groups: some would be empty; set "
        f"learner.mini_batches to {groups} or less"
    )


def _updates_are_named(config: Config) -> str | None:
    update = config.update
    if update.what == "partial" and not update.names:
        return "update.what=partial with update.names empty trains nothing; name parameters, for example [lm_head.*]"
    if update.what != "partial" and update.names:
        return f"update.names={update.names} with update.what={update.what} does nothing; set update.what=partial"
    return None


def _critic_warm_up_ends(config: Config) -> str | None:
    warmup, steps = config.critic.warmup_steps, config.run.steps
    if config.algorithm.advantage != "gae" or warmup < steps:
        return None
    return f"critic.warmup_steps={warmup} of run.steps={steps}: the actor would never be trained; lower the first"


def _errors_travel_no_further_than_values(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm.c_bar <= algorithm.rho_bar:
        return None
    return (
        f"algorithm.c_bar={algorithm.c_bar} above algorithm.rho_bar={algorithm.rho_bar}: V-trace is shown to converge "
        "for c_bar up to rho_bar only; lower the first"
    )


METHOD_RULES: tuple[Callable[[Config], str | None], ...] = (
    _groups_can_be_compared,
    _old_rollouts_are_corrected,
    _proximal_fits_the_loss,
    _sequence_weights_count_once,
    _age_schedule_has_something_to_narrow,
    _dynamic_sampling_compares,
    _kl_has_a_weight,
    _kl_has_its_gradient,
    _dual_clip_acts,
    _mini_batches_have_groups,
    _updates_are_named,
    _critic_warm_up_ends,
    _errors_travel_no_further_than_values,
)

"""Methods by name, and the combinations that are refused."""

import pytest

from asyncrl.config import AlgorithmConfig
from asyncrl.config.loading import load_config, to_yaml
from asyncrl.config.methods import METHODS
from asyncrl.errors import ConfigError


def load(*overrides, file=None):
    return load_config(file, ["model.path=unused", *overrides])


def refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_line_of_configuration_is_a_whole_method(name):
    algorithm = load(f"algorithm.name={name}").algorithm
    for key, value in METHODS[name].items():
        assert getattr(algorithm, key) == value, key
    untouched = {key for key in vars(algorithm) if key not in METHODS[name]} - {"name"}
    assert all(getattr(algorithm, key) == getattr(AlgorithmConfig(), key) for key in untouched)


def test_grpo_is_the_defaults():
    assert METHODS["grpo"] == {} and load().algorithm == AlgorithmConfig()


def test_file_and_command_line_win_over_what_the_name_sets(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm:\n  tis_cap: 3.5\n  name: decoupled\n")
    algorithm = load("algorithm.clip_high=0.4", file=file).algorithm
    assert (algorithm.proximal, algorithm.tis_cap, algorithm.clip_high) == ("recomputed", 3.5, 0.4)


def test_the_name_on_the_command_line_replaces_the_method_of_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm:\n  name: decoupled\n")
    algorithm = load("algorithm.name=m2po", file=file).algorithm
    assert (algorithm.proximal, algorithm.masks) == ("behaviour", ["second_moment"])


def test_what_is_written_out_reads_back_the_same(tmp_path):
    file = tmp_path / "resolved.yaml"
    config = load("algorithm.name=gspo", "algorithm.clip_high=0.1")
    file.write_text(to_yaml(config))
    assert load_config(file) == config


def test_an_unknown_method_or_mask_is_refused_with_the_choices():
    assert "must be one of grpo, dr_grpo" in refusal("algorithm.name=gpro")
    assert "must be one of band, sequence_band" in refusal("algorithm.masks=[bnd]")


COLLAPSING = [
    ("algorithm.name=decoupled", "algorithm.correction=none"),
    ("algorithm.name=a3po", "algorithm.correction=none"),
    ("algorithm.name=reinforce", "algorithm.correction=none"),
    ("algorithm.name=grpo", "algorithm.correction=none"),
    ("algorithm.name=gspo", "algorithm.correction=none"),
]


@pytest.mark.parametrize("overrides", COLLAPSING)
def test_asynchronous_training_without_a_correction_needs_that_one_knows(overrides):
    message = refusal("staleness.max_age=4", *overrides)
    assert "known to collapse" in message and "algorithm.i_know=true" in message and "staleness.max_age=4" in message
    load("staleness.max_age=4", *overrides, "algorithm.i_know=true")
    load("staleness.max_age=0", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm.dual_clip=3",),
        ("algorithm.name=cispo",),
        ("algorithm.name=topr",),
        ("algorithm.proximal=recomputed", "algorithm.masks=[band]"),
    ],
)
def test_what_bounds_the_ratio_by_other_means_needs_no_weight(overrides):
    load("staleness.max_age=4", "algorithm.correction=none", *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.name=rloo", "algorithm.proximal=recomputed"], ["proximal=recomputed", "loss=reinforce"]),
        (["algorithm.correction=sequence_tis"], ["both would count", "loss=ppo_clip"]),
        (["algorithm.name=reinforce", "algorithm.age_schedule=clip"], ["has no clip"]),
        (["algorithm.name=cispo", "algorithm.age_schedule=cap"], ["tis_cap is not used"]),
        (["algorithm.name=ppo", "algorithm.dynamic_sampling=true"], ["dynamic_sampling=true", "advantage=gae"]),
        (["algorithm.kl_in=reward"], ["there is no KL", "algorithm.kl_coef"]),
        (["algorithm.kl_estimator=k1"], ["kl_in=loss", "gradient is 0", "k3 or k2 or k3_weighted"]),
        (["algorithm.kl_estimator=abs"], ["kl_in=loss", "it is a distance"]),
        (["algorithm.kl_estimator=abs", "algorithm.kl_in=reward"], ["it is a distance", "auto or k1"]),
        (["algorithm.kl_estimator=k3", "algorithm.kl_in=reward"], ["is not that of the KL", "auto or k1"]),
        (["algorithm.kl_estimator=k2", "algorithm.kl_in=reward"], ["is not that of the KL", "auto or k1"]),
        (["algorithm.kl_estimator=k3_weighted", "algorithm.kl_in=reward"], ["is not that of the KL", "auto or k1"]),
        (["algorithm.dual_clip=1"], ["algorithm.dual_clip=1.0", "above 1"]),
        (["algorithm.name=gspo", "algorithm.dual_clip=3"], ["only ppo_clip has a dual clip"]),
        (["algorithm.kl_target=0.1"], ["algorithm.kl_target=0.1", "algorithm.kl_coef"]),
        (["learner.mini_batches=17"], ["learner.mini_batches=17", "groups_per_step=16"]),
        (["update.what=partial"], ["update.names empty"]),
        (["update.names=[a]"], ["update.what=full"]),
        (["algorithm.name=ppo", "critic.warmup_steps=100"], ["critic.warmup_steps=100", "run.steps=100"]),
        (["algorithm.c_bar=2"], ["algorithm.c_bar=2.0", "rho_bar=1.0"]),
        (["sampling.group_size=1"], ["advantage=group", "set sampling.group_size to 2"]),
        (["sampling.group_size=1", "algorithm.name=rloo"], ["advantage=rloo"]),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_the_remedy(overrides, words):
    message = refusal(*overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["reinforce_pp", "remax", "ppo"])
def test_methods_that_compare_with_something_else_take_groups_of_one(name):
    load(f"algorithm.name={name}", "sampling.group_size=1")

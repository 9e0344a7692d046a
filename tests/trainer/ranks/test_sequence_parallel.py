"""Ranks that share the tokens of packed rows compute what one does: layers, and whole steps with every figure."""

import json

import pytest
from transformers import GPT2Config, Qwen2Config

from asyncrl.errors import ConfigError
from asyncrl.trainer.engines.sequence_parallel import check_sequence_parallel, slice_lengths, slice_of
from tests.trainer.ranks.cases import SEQUENCE_MUTANTS, SHARED_SEQUENCES, SHARING
from tests.trainer.ranks.processes import run_world
from tests.trainer.ranks.test_equal_to_one_rank import TOLERANCE, results_of, worst_of

pytestmark = pytest.mark.bits

STEPS = 2
# Cases and mutants of two ranks that share all rows, and of two times two that share half of them each. The quick ones
# of two ranks are in test_two_ranks.
THOROUGH = {
    2: (tuple(sorted(set(SHARED_SEQUENCES) - set(SHARING[0]))), tuple(sorted(set(SEQUENCE_MUTANTS) - set(SHARING[1])))),
    4: (
        ("grpo", "kl_in_reward", "ppo_own_trunk", "ppo_shared_trunk", "m2po", "lora", "gspo", "few_inputs"),
        ("sums_counted_by_each", "kl_counted_by_each"),
    ),
}


@pytest.fixture(scope="module", params=THOROUGH)
def thorough(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thorough")
    return request.param, results_of(request.param, STEPS, *THOROUGH[request.param], folder, sequence=2)


def check_world(results, cases, mutants):
    for name in cases:
        figure, off = worst_of(results[name])
        assert off <= TOLERANCE, (name, figure)
        assert any(key.startswith("gradient of") for key in results[name]["worst"]), name
    for name in mutants:
        assert worst_of(results[name])[1] > 1e-2, name
    assert results["canary"]["off"] < 1e-5, "all ranks score it as one process does"
    assert results["differing"][:2] == ["", ""]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_figures_and_gradients_are_those_of_one_rank_for_all_methods(thorough):
    size, results = thorough
    check_world(results, *THOROUGH[size])
    if size == 4:
        assert results["few_inputs"]["dummies"] > 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    run_world(2, "tests.trainer.ranks.sequence_program", [str(folder / "results")], folder / "log", timeout_s=150.0)
    return json.loads((folder / "results").read_text())


@pytest.mark.slow
def test_hidden_states_and_gradients_are_those_of_one_process(written):
    assert len(written["found"]) == 6
    for name, (hidden, gradient) in written["found"].items():
        assert hidden < 1e-6, name  # norms are float32 in transformers
        assert gradient < 1e-5, name


@pytest.mark.slow
def test_heads_that_cannot_be_dealt_are_refused(written):
    assert "3 heads of queries and 3 of keys cannot be dealt to 2 ranks" in written["refused"]


def test_slices_hold_each_input_once_and_are_as_equal_as_can_be():
    assert slice_lengths(7, 3) == [3, 2, 2]
    assert [slice_of(7, rank, 3) for rank in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert slice_lengths(1, 2) == [1, 0]


@pytest.mark.parametrize(
    ("config", "is_packed", "words"),
    [
        (Qwen2Config(num_attention_heads=6, num_key_value_heads=2), True, "6 heads of queries and 2 of keys"),
        (GPT2Config(n_head=6), True, "6 heads of queries and 6 of keys"),
        (Qwen2Config(num_attention_heads=8), False, "cannot be packed"),
        (
            Qwen2Config(num_attention_heads=8, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            True,
            "rotary angles (dynamic)",
        ),
    ],
)
def test_a_model_whose_rows_ranks_cannot_share_is_refused(config, is_packed, words):
    with pytest.raises(ConfigError) as raised:
        check_sequence_parallel(config, 4, "model.path=m", is_packed=is_packed)
    assert str(raised.value).startswith("learner.sequence_parallel=4 with model.path=m: ")
    assert words in str(raised.value)
    check_sequence_parallel(config, 1, "model.path=m", is_packed=is_packed)
    check_sequence_parallel(Qwen2Config(num_attention_heads=8, num_key_value_heads=2), 4, "m", is_packed=True)

"""A mixture of experts, trained by the two commands: every version is proven, and adapters leave the experts alone."""

from __future__ import annotations

import pytest

from tests.conftest import make_tiny_model, randomize
from tests.e2e.daemons import START_S, STEP_S
from tests.tiny_experts import expert_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def expert_model_dir(tmp_path_factory):
    from transformers import Qwen3MoeForCausalLM

    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "experts", tied=True)  # for its tokenizer
    model = Qwen3MoeForCausalLM(expert_config()).float()
    randomize(model, 0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("update", [{"what": "full"}, {"what": "lora", "lora_rank": 4}])
def test_d10_a_mixture_of_experts_trains_and_every_version_is_proven(make_run, expert_model_dir, update):
    run = make_run(expert_model_dir).configure(run={"steps": 3}, update=update)
    daemons = [run.learner(), run.generator()]
    run.wait_for_version(3, *daemons, timeout_s=START_S)
    codes = [daemon.exit_code(STEP_S) for daemon in daemons]
    assert codes == [0, 0], "\n".join(daemon.last_words() for daemon in daemons)
    syncs = [record for record in run.records("sync") if record["generators_committed"]]
    assert {0, 3} <= {sync["version"] for sync in syncs}
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)

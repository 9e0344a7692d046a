"""Runs that train a part of the model only, by the two commands: what travels, what is proven, what is resumed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.e2e.daemons import START_S, STEP_S, Run, check_every_ordinal_once

pytestmark = pytest.mark.slow

UPDATES = {
    "adapters": {"what": "lora", "lora_rank": 4},
    "merged": {"what": "lora", "lora_rank": 4, "lora_sync": "merged"},
    "partial": {"what": "partial", "names": ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]},
}


def finish(run: Run) -> None:
    daemons = [run.learner(), run.generator()]
    run.wait_for_version(run.version() + 1, *daemons, timeout_s=START_S)
    codes = [daemon.exit_code(STEP_S) for daemon in daemons]
    assert codes == [0, 0], "\n".join(daemon.last_words() for daemon in daemons)


def trained_policy(run: Run):
    """The policy of the newest checkpoint, as the trainer would load it."""
    import torch

    from asyncrl.config.loading import load_config
    from asyncrl.trainer.checkpoint import load_checkpoint
    from asyncrl.trainer.engines.single import load_engines
    from asyncrl.trainer.step import StepRunner

    config = load_config(run.run_dir / "config.yaml")
    runner = StepRunner(load_engines(config, torch.device("cpu")), config)
    assert load_checkpoint(run.run_dir / "checkpoints", runner) is not None
    return runner.engines.actor.policy


@pytest.mark.parametrize("name", list(UPDATES))
def test_a_run_that_trains_a_part_is_proven_at_every_sync_sends_that_part_alone_and_is_resumed(
    make_run, tied_model_dir, name
):
    import torch

    from asyncrl.trainer.engines.policy import Policy
    from tests.tolerances import assert_near

    run = make_run().configure(update=UPDATES[name], algorithm={"kl_coef": 0.01}, learner={"lr": 1e-2})
    run.configure(run={"steps": 4})
    finish(run)
    run.configure(run={"steps": 7})
    finish(run)  # a new trainer from the checkpoint, and a generator that knows nothing but the initial model
    check_every_ordinal_once(run, 7)
    policy = trained_policy(run)
    syncs = [record for record in run.records("sync") if record["generators_committed"]]
    assert {sync["version"] for sync in syncs} >= {0, 7}
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)
    sent = {id(tensor): tensor.nbytes for _, tensor in policy.sync_source().named}
    padding = 64 * len(sent)
    assert {sync["num_bytes"] for sync in syncs} <= set(range(sum(sent.values()), sum(sent.values()) + padding))
    whole = sum(tensor.nbytes for tensor in policy.model.state_dict().values())
    assert sum(sent.values()) < whole / 2 or name == "merged"
    sequence = [list(range(2, 60))]
    ours = policy.score(sequence)[0]
    exported = Policy.load(str(run.run_dir / "export")).score(sequence)[0]
    assert_near(exported, ours)
    initial = Policy.load(str(tied_model_dir))
    assert np.abs(initial.score(sequence)[0] - ours).max() > 1e-3
    frozen = dict(initial.named_sync_parameters())
    if name == "partial":
        kept = [key for key, tensor in policy.named_sync_parameters() if torch.equal(tensor, frozen[key])]
        assert set(frozen) - set(kept) == {*UPDATES[name]["names"], "model.embed_tokens.weight"}

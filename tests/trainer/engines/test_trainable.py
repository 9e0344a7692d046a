"""Full, partial and LoRA updates: what is trained, what it costs, what is published, saved and exported."""

import copy
import json

import numpy as np
import pytest
import torch

from asyncrl.config import Config, ModelConfig, UpdateConfig
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.link.field_checks import to_plain
from asyncrl.link.weight_records import ALIGNMENT
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.engines.export import export_model
from asyncrl.trainer.engines.policy import AdaptersOff, Policy, load_policy
from asyncrl.trainer.engines.single import load_engines
from asyncrl.trainer.engines.trainable import apply_update, frozen_digests, named_parameters
from asyncrl.trainer.packing import pack_groups
from asyncrl.weights.bytes.layout import tensor_views
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.tolerances import assert_near
from tests.trainer.test_step import make_trainer
from tests.trainer.tiny import policy_of, random_groups, save_tiny_model, tiny_model, tiny_policy

pytestmark = pytest.mark.numeric

SEQUENCES = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
Q1 = "model.layers.1.self_attn.q_proj.weight"


def lora(**changes):
    return UpdateConfig(**({"what": "lora", "lora_rank": 4, "lora_targets": ["q_proj", "down_proj"]} | changes))


def partial(*names):
    return UpdateConfig(what="partial", names=list(names))


def policy_with(update, *, seed=0, **model):
    policy = tiny_policy(**model)
    apply_update(policy.model, update, seed)
    policy.update = update
    return policy


def trainer_with(update, *, steps=0, seed=0, with_reference=False, tied=True, **settings):
    policy = policy_with(update, seed=seed, tied=tied)
    reference = policy.initial_policy() if with_reference else None
    trainer = make_trainer(policy, reference=reference, weight_decay=0.1, **settings)
    for step in range(steps):
        trainer.step(random_groups(3, 4, seed=step))
    return trainer


def tensors(policy):
    """Every parameter by name, copied."""
    return {name: value.detach().clone() for name, value in named_parameters(policy.model)}


UPDATES = {
    "full": UpdateConfig(),
    "partial": partial("model.layers.1.*", "model.norm.weight"),
    "one projection": partial(Q1),
    "tied head": partial("lm_head.weight"),
    "lora": lora(),
}


# -- selection ---------------------------------------------------------------------------------------------


def test_a_pattern_selects_by_name_and_training_one_name_of_a_tied_weight_is_training_both():
    def trained(*patterns, tied=True):
        return set(policy_with(partial(*patterns), tied=tied).trained_tensors())

    assert trained(Q1) == {Q1}
    assert trained("model.layers.*.self_attn.[qk]_proj.weight") == {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qk"
    }
    assert trained("lm_head.weight") == trained("*embed_tokens*") == {"model.embed_tokens.weight"}
    assert trained("lm_head.weight", tied=False) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (partial("model.layer.1.self_attn.q_proj.weight"), "nearest name is 'model.layers.1.self_attn.q_proj.weight'"),
        (partial(Q1, "model.Norm.weight"), "'model.Norm.weight' matches no parameter .* 'model.norm.weight'"),
        (partial(), "needs update.names"),
        (lora(lora_targets=["q_proj", "querry_proj"]), "'querry_proj' is the name of no linear layer"),
        (lora(lora_targets=["q_prj"]), "nearest name is 'q_proj'"),
        (lora(lora_targets=["lm_head"]), "below its head"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_nearest_one_and_nothing_is_changed(update, message):
    model = tiny_model(tied=False)
    names = [name for name, _ in named_parameters(model)]
    with pytest.raises(ConfigError, match=message):
        apply_update(model, update)
    assert [name for name, _ in named_parameters(model)] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(UPDATES))
def test_gradient_and_optimizer_state_exist_for_what_is_trained_alone_and_the_rest_keeps_its_bits(name):
    trainer = trainer_with(UPDATES[name])
    policy = policy_of(trainer)
    before = tensors(policy)
    batches = pack_groups(random_groups(3, 4), 0, 64)
    for batch in batches:
        policy.logprobs(batch.rows, 1.0)[0].sum().backward()
    with_gradient = {name for name, value in named_parameters(policy.model) if value.grad is not None}
    names = {name for name, value in named_parameters(policy.model) if value.requires_grad}
    assert with_gradient == names
    for step in range(2):
        trainer.step(random_groups(3, 4, seed=step))
    trained = policy.trainable_parameters()
    assert {id(parameter) for parameter in trainer.engines.actor.optimizer.state} == {
        id(parameter) for parameter in trained
    }
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in trainer.engines.actor.optimizer.state.values())
    assert moments == 2 * sum(parameter.nbytes for parameter in trained)
    after = tensors(policy)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names


@pytest.mark.parametrize("name", list(UPDATES))
def test_the_reference_stays_the_initial_policy_and_takes_memory_for_what_is_trained_alone(name):
    update = UPDATES[name]
    trainer = trainer_with(update, with_reference=True, kl_coef=0.1)
    policy, reference = policy_of(trainer), trainer.engines.actor.reference
    initial = policy.score(SEQUENCES)
    metrics = [trainer.step(random_groups(3, 4, seed=step)).metrics for step in range(3)]
    assert metrics[0]["kl_reference"] == pytest.approx(0.0, abs=1e-7)
    assert metrics[2]["kl_reference"] > 1e-5
    for ours, theirs, now in zip(initial, reference.score(SEQUENCES), policy.score(SEQUENCES), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.abs(ours - now).max() > 1e-4
    if update.what == "lora":
        assert isinstance(reference, AdaptersOff)
        return
    own = {value.data_ptr() for value in policy.model.parameters()}
    extra = sum(value.nbytes for value in reference.model.parameters() if value.data_ptr() not in own)
    assert extra == sum(value.nbytes for value in policy.trainable_parameters())
    assert reference.trainable_parameters() == []


# -- what is published -------------------------------------------------------------------------------------


def snapshot_of(policy, wire_dtype=None):
    source = policy.sync_source()
    buffer = SnapshotBuffer(source.named, 4096, wire_dtype, adapted=source.adapted, patch=source.patch)
    buffer.snapshot()
    return buffer, dict(tensor_views(buffer.layout, buffer.flat))


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", list(UPDATES))
def test_the_bytes_on_the_wire_are_those_of_what_is_trained(name, wire_dtype):
    policy = policy_with(UPDATES[name])
    buffer, _ = snapshot_of(policy, wire_dtype)
    item = 2 if wire_dtype else 4
    padded = [-(-value.numel() * item // ALIGNMENT) * ALIGNMENT for value in policy.trainable_parameters()]
    assert buffer.layout.total_bytes == sum(padded)


def test_a_full_update_is_published_as_before_without_a_patch_and_a_tied_head_once():
    policy = tiny_policy()
    source = policy.sync_source()
    assert source.patch is None and not source.adapted
    assert [name for name, _ in source.named] == [name for name, _ in policy.named_sync_parameters()]
    assert "patch" not in to_plain(snapshot_of(policy)[0].manifest(1))
    named = dict(source.named)
    assert named["lm_head.weight"] is named["model.embed_tokens.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_what_travels_and_what_stays_make_up_the_model(tied):
    plain = {name for name, _ in tiny_policy(tied=tied).named_sync_parameters()}
    for update in (partial("lm_head.weight"), partial(Q1), lora(), lora(lora_sync="merged")):
        source = policy_with(update, tied=tied).sync_source()
        halves = {name for name, _ in source.named if ".lora_" in name}
        assert (source.patch.scale is None) == (not halves)
        carried = {name for name, _ in source.named} - halves
        base, twins = {name for name, _ in source.patch.base}, {name for name, _ in source.patch.tied}
        assert carried | base | twins == plain
        assert not carried & base and not carried & twins
        assert twins == ({"lm_head.weight"} if tied and "lm_head.weight" not in carried else set())


def test_merged_snapshots_hold_the_weights_plus_scaled_b_times_a_and_follow_training():
    trainer = trainer_with(lora(lora_sync="merged", lora_alpha=6.0), steps=2)
    policy = policy_of(trainer)
    before = tensors(policy)
    buffer, views = snapshot_of(policy)
    trained = policy.trained_tensors()
    for _ in range(2):
        assert len(views) == 4
        for name, view in views.items():
            stem = name.removesuffix(".weight")
            a, b = trained[f"{stem}.lora_A.weight"].double(), trained[f"{stem}.lora_B.weight"].double()
            expected = before[name].double() + 6.0 / 4 * b @ a
            assert (b @ a).abs().max() > 1e-3
            assert_near(view, expected, steps=16)
        trainer.step(random_groups(3, 4, seed=7))
        buffer.snapshot()


def test_the_digests_of_frozen_parameters_notice_a_changed_one_and_list_a_tied_one_once():
    policy = policy_with(partial(Q1))
    before = frozen_digests(policy.model)
    assert Q1 not in before and "lm_head.weight" not in before and "model.embed_tokens.weight" in before
    with torch.no_grad():
        policy.model.model.norm.weight[3] += 1e-3
    after = frozen_digests(policy.model)
    assert [name for name in before if before[name] != after[name]] == ["model.norm.weight"]


# -- checkpoints and exports -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(UPDATES))
def test_training_resumes_bit_for_bit_from_what_was_trained_alone(tmp_path, name):
    from safetensors import safe_open

    straight = trainer_with(UPDATES[name], with_reference=True, kl_coef=0.1)
    expected = [straight.step(random_groups(3, 4, seed=step)).metrics for step in range(5)]
    first = trainer_with(UPDATES[name], with_reference=True, kl_coef=0.1, steps=3)
    path = save_checkpoint(tmp_path, first, run_epoch=1)
    if name != "full":
        file = path / ("adapter/adapter_model.safetensors" if name == "lora" else "trainer/weights.safetensors")
        with safe_open(file, "pt") as stored:
            names = {stored_name.removeprefix("base_model.model.") for stored_name in stored.keys()}  # noqa: SIM118
        assert names == set(policy_of(first).trained_tensors())
    second = trainer_with(UPDATES[name], with_reference=True, kl_coef=0.1, seed=5)
    assert load_checkpoint(tmp_path, second).version == 3
    assert [second.step(random_groups(3, 4, seed=step)).metrics for step in (3, 4)] == expected[3:]
    uninterrupted, resumed = tensors(policy_of(straight)), tensors(policy_of(second))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (lora(), UpdateConfig(), "of update lora of rank 4, .* the trainer holds full"),
        (UpdateConfig(), lora(), "of update full, the trainer holds lora of rank 4"),
        (lora(), lora(lora_rank=8), "rank 4, alpha 32 .* rank 8, alpha 32"),
        (lora(), lora(lora_alpha=8.0), "alpha 32 .* alpha 8"),
        (lora(), lora(lora_targets=["q_proj"]), "on q_proj, down_proj, the trainer holds .* on q_proj;"),
        (partial(Q1), partial("model.norm.weight"), f"partial on {Q1}, the trainer holds partial on model.norm.weight"),
    ],
)
def test_a_checkpoint_of_another_update_is_refused_with_both_values(tmp_path, saved, own, message):
    save_checkpoint(tmp_path, trainer_with(saved), run_epoch=1)
    trainer = trainer_with(own)
    before = tensors(policy_of(trainer))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, trainer)
    assert all(torch.equal(value, before[name]) for name, value in tensors(policy_of(trainer)).items())


def test_how_adapters_are_published_may_change_between_two_starts(tmp_path):
    save_checkpoint(tmp_path, trainer_with(lora(), steps=1), run_epoch=1)
    assert load_checkpoint(tmp_path, trainer_with(lora(lora_sync="merged"))).version == 1


def test_a_checkpoint_is_refused_beside_other_frozen_weights(tmp_path):
    save_checkpoint(tmp_path, trainer_with(partial(Q1)), run_epoch=1)
    policy = policy_with(partial(Q1))
    with torch.no_grad():
        policy.model.model.norm.weight[0] += 0.5
    with pytest.raises(CheckpointError, match="of frozen weights .* the weights in model.path"):
        load_checkpoint(tmp_path, make_trainer(policy))


def test_a_checkpoint_from_before_there_was_a_choice_is_one_of_a_full_update(tmp_path):
    from asyncrl.storage.checkpoint_files import read_manifest, write_checkpoint

    trainer = trainer_with(UpdateConfig(), steps=1)
    path = save_checkpoint(tmp_path, trainer, run_epoch=1)
    weights, state = (path / "model.safetensors").read_bytes(), trainer.state()
    old = {
        "version": state.version,
        "optimizer": trainer.engines.actor.optimizer.state_dict(),  # by number
        "kl_coef": state.kl_coef,
        "cpu_rng": state.cpu_rng,
    }
    extra = {name: value for name, value in read_manifest(path).extra.items() if name in ("architecture", "torch")}

    def write(folder):
        (folder / "weights.safetensors").write_bytes(weights)
        torch.save(old, folder / "trainer.pt")

    write_checkpoint(tmp_path, 1, write, run_epoch=1, extra=extra)
    second = trainer_with(UpdateConfig(), seed=5)
    assert load_checkpoint(tmp_path, second).version == 1
    assert second.step(random_groups(3, 4, seed=9)).metrics == trainer.step(random_groups(3, 4, seed=9)).metrics
    with pytest.raises(CheckpointError, match="of update full"):
        load_checkpoint(tmp_path, trainer_with(lora()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["partial", "lora"])
def test_the_export_is_a_plain_model_with_the_policys_log_probs(tmp_path, name, tied):
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "model", tied=tied)
    policy = load_policy(ModelConfig(path=str(folder)), torch.device("cpu"), update=UPDATES[name], seed=3)
    trainer = make_trainer(policy)
    for step in range(3):
        trainer.step(random_groups(3, 4, seed=step))
    before = tensors(policy)
    scores = policy.score(SEQUENCES)
    export_model(policy, folder, tmp_path / "export")
    assert all(torch.equal(value, before[name]) for name, value in tensors(policy).items()), "an export changes nothing"
    assert "adapter" not in " ".join(path.name for path in (tmp_path / "export").iterdir())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(model) is type(tiny_model()) and not info["missing_keys"] and not info["unexpected_keys"]
    original = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "export" / "config.json").read_text()) == original
    initial = Policy.load(str(folder)).score(SEQUENCES)
    for ours, theirs, old in zip(scores, Policy(model).score(SEQUENCES), initial, strict=True):
        assert_near(theirs, ours)
        assert np.abs(ours - old).max() > 1e-3


def test_the_update_is_applied_before_the_reference_is_made(tmp_path):
    config = Config()
    config.model.path = str(save_tiny_model(tmp_path / "model"))
    config.update = copy.deepcopy(lora())
    config.algorithm.kl_coef = 0.1
    actor = load_engines(config, torch.device("cpu")).actor
    assert isinstance(actor.reference, AdaptersOff)
    assert actor.policy.update.what == "lora" and len(actor.policy.trainable_parameters()) == 8
    config.algorithm.kl_coef = 0.0
    assert load_engines(config, torch.device("cpu")).actor.reference is None

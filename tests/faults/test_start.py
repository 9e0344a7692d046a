"""A start that is safe, and checkpoints that a user can use: each test is named after the fault that it holds."""

import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import asyncrl
from asyncrl.cli import dry_run, generator, learner
from asyncrl.cli.forecast import learner_needs
from asyncrl.cli.reward_checks import check_rewards
from asyncrl.config import ModelConfig, UpdateConfig
from asyncrl.config.host_checks import check_host
from asyncrl.config.loading import load_config, to_yaml
from asyncrl.desk.evaluation import evaluation_due
from asyncrl.errors import ConfigError, TaskError, UserError
from asyncrl.generator.engines.vllm.options import stop_token_ids
from asyncrl.host.addresses import is_loopback, is_wildcard, rollout_address
from asyncrl.host.model_config import check_generation_config, known_context
from asyncrl.host.model_folder import find_model
from asyncrl.host.processes import StopSignal
from asyncrl.storage import model_files
from asyncrl.tasks.base import load_task
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.policy import load_policy
from benchmarks import common
from benchmarks.speed.memory_forecast import CONFIGURATIONS, in_a_process
from benchmarks.studies import async_vs_sync
from tests.benchmarks.scripts import check_quick_record
from tests.conftest import MAX_LENGTH, make_tiny_model, reference_logprobs, start_engine
from tests.e2e.letters_task import Letters
from tests.model_folders import make_model_folder
from tests.tolerances import assert_near
from tests.trainer.test_step import make_trainer
from tests.trainer.tiny import policy_of, random_groups

ROOT = Path(__file__).parents[2]

# -- D9: words that YAML takes for something else

TEXTS = ["1.10", "2024_01_01", "007", "7e12345", "yes", "no", "null", "off", "0x10", "1_000", "2024-01-01", "12e-3"]


def load(*overrides):
    return load_config(None, ["model.path=m", *overrides])


def load_text(folder, text, *overrides):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("text", TEXTS)
def test_D9_a_text_is_taken_as_written_on_the_command_line_and_in_files(tmp_path, text):
    config = load(f"run.name={text}")
    assert (config.run.name, config.run.dir) == (text, f"runs/{text}")
    written = load_text(tmp_path, f"model: {{path: {text}}}\nrun:\n  name: {text}\n")
    assert (written.run.name, written.model.path) == (text, text)
    assert load_text(tmp_path, to_yaml(written)) == written


def test_D9_off_is_a_choice_like_any_other(tmp_path):
    assert load("log.wandb=off").log.wandb == "off"
    assert load_text(tmp_path, "model: {path: m}\nlog:\n  wandb: off\n").log.wandb == "off"
    with pytest.raises(ConfigError, match=r"log\.wandb=on .*: must be one of off, offline, online"):
        load("log.wandb=on")


def test_D9_elements_of_a_list_of_texts_are_taken_as_written(tmp_path):
    names = ["off", "1.10", "7e12345", "null", "a b"]
    assert load("update.what=partial", "update.names=[off, 1.10, 7e12345, null, 'a b']").update.names == names
    text = "model: {path: m}\nupdate:\n  what: partial\n  names:\n  - off\n  - 1.10\n  - 7e12345\n  - null\n  - a b\n"
    assert load_text(tmp_path, text).update.names == names


def test_D9_names_in_an_open_mapping_are_taken_as_written(tmp_path):
    assert load("reward.weights={no: 2, 1: 3}").reward.weights == {"no": 2, "1": 3}
    text = "model: {path: m}\nreward:\n  weights: {on: 0.5, 7: 1}\ntask: {args: {y: off, size: 1e-3}}\n"
    config = load_text(tmp_path, text)
    assert config.reward.weights == {"on": 0.5, "7": 1}
    assert config.task.args == {"y": False, "size": 1e-3}


def test_D9_a_text_may_hold_what_yaml_reserves():
    assert load("run.dir=runs/a #1: b").run.dir == "runs/a #1: b"
    assert load("run.dir='runs/a'").run.dir == "runs/a"
    assert load("run.name=a-${run.seed}", "run.seed=3").run.name == "a-3"


def test_D9_numbers_are_decimal(tmp_path):
    config = load("run.steps=010", "learner.cpus=[010]", "learner.lr=1e-4", "run.seed=1_000")
    assert (config.run.steps, config.learner.cpus, config.learner.lr, config.run.seed) == (10, [10], 1e-4, 1000)
    assert load_text(tmp_path, "model: {path: m}\nrun: {steps: 010}\n").run.steps == 10
    for override in ("run.steps=1:30", "learner.lr=1:30.5", "learner.cpus=[1:30]"):
        with pytest.raises(ConfigError, match="must be"):
            load(override)


def test_D9_sections_that_share_an_anchor_keep_their_own_types(tmp_path):
    text = "model: {path: m}\nlearner: &l {device: cpu, threads: 02}\ngenerator: {<<: *l, id: 08}\n"
    config = load_text(tmp_path, text)
    assert (config.learner.threads, config.generator.threads, config.generator.id) == (2, 2, "08")


# -- D14: addresses that mean every interface

WILDCARDS = [
    *("0", "0.0", "0.0.0", "0.0.0.0", "00", "0x0", "0x0.0", "000.0.0x0.0", "*"),
    *("[::]", "[0::0]", "[0:0:0:0:0:0:0:0]", "[::0.0.0.0]", "[::ffff:0.0.0.0]", "[::ffff:0:0]", "[::FFFF:0:0]"),
]


@pytest.mark.parametrize("host", WILDCARDS)
def test_D14_every_spelling_of_a_wildcard_address_is_refused(host):
    assert is_wildcard(host)
    with pytest.raises(ConfigError, match="listens on every interface"):
        rollout_address(f"tcp://{host}:5770")
    with pytest.raises(ConfigError, match=r"weights\.host=.* must be one private address"):
        load(f"weights.host={host}")


def test_D14_one_address_has_one_spelling_after_parsing():
    for host in ("127.1", "0x7f.0.0.1", "[::ffff:127.0.0.1]", "2130706433", "localhost"):
        assert rollout_address(f"tcp://{host}:5770").text == "tcp://127.0.0.1:5770"
        assert is_loopback(host)
    assert rollout_address("tcp://[fe80::1]:5770").text == "tcp://[fe80::1]:5770"
    assert not is_loopback("10.1") and not is_wildcard("10.1") and not is_wildcard("zero.example")
    with pytest.raises(ConfigError, match="public address"):
        load("weights.host=::ffff:8.8.8.8")


# -- D8, D12: what config.json says of a model

MODEL_FILE = {"vocab_size": 50, "hidden_size": 8, "max_position_embeddings": 256}
NESTED = {
    "Gemma3ForConditionalGeneration": {"text_config": MODEL_FILE, "vision_config": {}},
    "Qwen3_5ForConditionalGeneration": {"text_config": MODEL_FILE},
    "InternVLChatModel": {"llm_config": MODEL_FILE},
    "LlavaForConditionalGeneration": {"text_config": {}, "vocab_size": 50},
    "T5ForConditionalGeneration": {"is_encoder_decoder": True, "vocab_size": 50},
}


def folder_of(path, **config):
    folder = make_model_folder(path)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
    return folder


def commands(*arguments):
    """(exit code, stderr) of both commands with --dry-run."""
    for main in (learner.main, generator.main):
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            code = main([*arguments, "--dry-run"])
        yield code, err.getvalue()


def checked(path, *overrides):
    """The model, after both commands' checks."""
    config = load_config(path, overrides)
    return [check_host(config, role) for role in ("learner", "generator")][0]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {{dir: {tmp_path / 'run'}}}\nmodel: {{max_length: 64}}\nsampling: {{max_new_tokens: 16}}\n")
    return str(path)


@pytest.mark.parametrize("name", NESTED)
def test_D8_a_model_with_other_parts_than_text_is_refused_by_name(tmp_path, config_file, name):
    folder = folder_of(tmp_path / "model", architectures=[name], **NESTED[name])
    for code, message in commands(config_file, f"model.path={folder}"):
        assert code == 2
        assert f"{name} is a model with other parts than a text decoder" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must be an object"),
        ('{"model_type": "llama"}', "has no vocab_size"),
        ('{"vocab_size": null}', "has no vocab_size"),
        ('{"vocab_size": "50"}', "has no vocab_size"),
        ('{"vocab_size": true}', "has no vocab_size"),
        (
            '{"vocab_size": 50, "quantization_config": {"quant_method": "gptq"}}',
            "quantized (quantization_config: gptq)",
        ),
        ("{", "cannot be read"),
        ("\udcff", "cannot be read"),
    ],
)
def test_D8_whatever_config_json_holds_is_a_sentence_and_exit_code_2(tmp_path, config_file, text, words):
    folder = make_model_folder(tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for code, message in commands(config_file, f"model.path={folder}"):
        assert code == 2 and words in message and "Traceback" not in message


def test_D8_sizes_that_are_no_numbers_are_taken_for_unknown(tmp_path, config_file):
    odd = {"num_key_value_heads": [1, 2], "head_dim": "8", "num_attention_heads": 4, "num_hidden_layers": 2}
    folder = folder_of(tmp_path / "model", **MODEL_FILE, **odd)
    assert checked(config_file, f"model.path={folder}").kv_bytes_per_token(4) == 2 * 2 * 4 * 2 * 4


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 512),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 256),
        ({"rope_scaling": None}, 256),
        ({"max_position_embeddings": None, "n_positions": 128}, 128),
        ({"n_positions": 128}, 128),
    ],
)
def test_D12_a_length_up_to_the_context_works_and_a_larger_one_is_refused(tmp_path, config_file, changes, context):
    folder = folder_of(tmp_path / "model", **MODEL_FILE | changes)
    given = (config_file, f"model.path={folder}", "learner.micro_batch_tokens=4096")
    checked(*given, f"model.max_length={context}")
    for code, message in commands(*given, f"model.max_length={context + 1}"):
        assert code == 2
        assert f"model.max_length={context + 1} is longer than the context" in message
        assert f"set model.max_length to {context} or less" in message


@pytest.mark.slow
def test_D12_the_engine_generates_up_to_the_context_and_scores_all_of_it(tmp_path):
    folder = make_tiny_model(tmp_path / "model", tied=True)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": MAX_LENGTH}))
    engine = start_engine(folder, tmp_path / "vllm.log", fits_context=True)
    try:
        engine.run(engine.sync())
        prompt = list(range(2, 34))
        request = {"num_rollouts": 1, "max_new_tokens": MAX_LENGTH - len(prompt), "seeds": None}
        longest = []
        for _ in range(20):  # a completion may end early
            (rollout,) = engine.run(engine.generate(prompt, **request))
            tokens = [*prompt, *rollout.token_ids]
            expected = reference_logprobs(engine.model, tokens)[len(prompt) - 1 :]
            assert_near(rollout.logprobs, expected, steps=4096)
            longest.append(len(tokens))
        scored = engine.run(engine.engine.score([(prompt * 6)[:MAX_LENGTH]], 20.0))
        assert_near(scored[0], reference_logprobs(engine.model, (prompt * 6)[:MAX_LENGTH]), steps=4096)
        assert max(longest) <= MAX_LENGTH
    finally:
        engine.run(engine.engine.close())
        engine.runner.close()


@pytest.mark.slow
def test_D12_a_context_that_config_json_leaves_out_is_that_of_the_kind_of_model():
    assert known_context({"model_type": "llama", "vocab_size": 50}) == 2048
    assert known_context({"model_type": "no such kind", "vocab_size": 50}) is None


def test_D12_the_critics_own_trunk_is_looked_at_too(tmp_path, config_file):
    folder = folder_of(tmp_path / "model", **MODEL_FILE)
    ppo = (config_file, f"model.path={folder}", "algorithm.name=ppo", "model.max_length=256")
    for name, changes, words in (
        ("short", {"max_position_embeddings": 255}, "longer than the context of critic.path="),
        ("small", {"vocab_size": 49}, "knows 49 tokens and model.path="),
    ):
        critic = folder_of(tmp_path / name, **MODEL_FILE | changes)
        code, message = next(commands(*ppo, f"critic.path={critic}"))
        assert code == 2 and words in message


# -- ranks that share sequences: whether the heads can be dealt to them


def test_heads_that_ranks_cannot_share_are_refused_before_anything_starts(tmp_path, config_file):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    given = (config_file, "learner.ranks=2", "learner.sequence_parallel=2", "model.max_length=256")
    for role, wide, narrow in (("model", heads, {}), ("critic", {"num_attention_heads": 6}, heads)):
        model = folder_of(tmp_path / f"model_{role}", **MODEL_FILE | wide)
        critic = folder_of(tmp_path / f"critic_{role}", **MODEL_FILE | narrow)
        code, message = next(commands(*given, "algorithm.name=ppo", f"model.path={model}", f"critic.path={critic}"))
        assert code == 2
        assert f"learner.sequence_parallel=2 with {role}.path=" in message
        assert "6 heads of queries and 3 of keys cannot be dealt to 2 ranks" in message
        checked(*given[:2], f"model.path={model}", "model.max_length=256")


# -- D7, U4: what loads can be saved, and every checkpoint is a model folder

GENERATION = [
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 0.0, "do_sample": False},
    {"early_stopping": True},
    {"top_k": 20, "num_beams": 1, "length_penalty": 2.0},
]
UPDATES = {
    "full": UpdateConfig(),
    "partial": UpdateConfig(what="partial", names=["model.layers.1.*"]),
    "lora": UpdateConfig(what="lora", lora_rank=4, lora_targets=["q_proj", "down_proj"]),
}


def trained(folder, update, *, steps=2, dtype="float32"):
    """A runner around the model of `folder`, after a few steps."""
    model = ModelConfig(path=str(folder), dtype=dtype)
    runner = make_trainer(load_policy(model, torch.device("cpu"), update=update, seed=3))
    for step in range(steps):
        runner.step(random_groups(3, 4, seed=step, vocab=23))
    return runner


@pytest.fixture
def model_folder(tmp_path):
    """A model with a tokenizer that loads."""
    folder = make_tiny_model(tmp_path / "whole", tied=True)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 1}))
    return folder


@pytest.mark.parametrize("settings", GENERATION)
def test_D7_a_model_that_loads_is_exported_and_saved_whatever_its_generation_config_says(
    tmp_path, model_folder, settings
):
    (model_folder / "generation_config.json").write_text(json.dumps(settings))
    runner = trained(model_folder, UPDATES["full"], steps=1)
    runner.engines.actor.export(tmp_path / "export", model_folder)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    for folder in (tmp_path / "export", checkpoint):
        assert json.loads((folder / "generation_config.json").read_text()) == settings
        again = AutoModelForCausalLM.from_pretrained(folder)
        for name, tensor in policy_of(runner).model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("name", UPDATES)
def test_U4_a_checkpoint_is_a_model_folder_for_transformers_and_for_model_path(
    tmp_path, config_file, model_folder, name
):
    runner = trained(model_folder, UPDATES[name])
    step = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    assert AutoTokenizer.from_pretrained(step).eos_token == "<end>"
    loaded, info = AutoModelForCausalLM.from_pretrained(step, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    merged = merged_state(policy_of(runner).model)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in loaded.state_dict().items())
    checked(config_file, f"model.path={step}")
    assert find_model(str(step)).num_parameters() == find_model(str(model_folder)).num_parameters()
    assert not [path for path in step.glob("*.safetensors") if not path.name.startswith("model")]
    again = trained(model_folder, UPDATES[name], steps=0)
    assert load_checkpoint(tmp_path / "checkpoints", again).version == 2
    left, right = (policy_of(which).checkpoint_tensors() for which in (runner, again))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_U4_large_models_are_cut_into_files_with_an_index(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(model_files, "MAX_SHARD_BYTES", 100_000)
    runner = trained(model_folder, UPDATES["full"])
    step = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    assert len(list(step.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(step).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in policy_of(runner).checkpoint_tensors().items())
    assert find_model(str(step)).num_parameters() == find_model(str(model_folder)).num_parameters()
    assert load_checkpoint(tmp_path / "checkpoints", trained(model_folder, UPDATES["full"], steps=0)).version == 2


def test_U4_float32_masters_are_the_models_weights_and_are_written_once(tmp_path, model_folder):
    runner = trained(model_folder, UPDATES["full"], dtype="bfloat16")
    step = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    weights = sum(tensor.nbytes for tensor in policy_of(runner).checkpoint_tensors().values())
    files = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert files < 3.3 * weights  # the weights and two moments
    assert json.loads((step / "config.json").read_text())["dtype"] == "float32"


def test_U4_merged_weights_are_written_as_generators_compute_with_them(tmp_path, model_folder):
    runner = trained(model_folder, UPDATES["lora"], dtype="bfloat16")
    step = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    loaded = AutoModelForCausalLM.from_pretrained(step)
    assert loaded.dtype == torch.bfloat16
    merged = merged_state(policy_of(runner).model)
    assert all(torch.equal(value, merged[name].bfloat16()) for name, value in loaded.state_dict().items())


def test_U4_adapters_are_in_the_format_of_peft(tmp_path, model_folder):
    runner = trained(model_folder, UPDATES["lora"])
    step = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    expected = merged_state(policy_of(runner).model)
    # By hand: W + alpha / r * B A, from nothing but the two files and the base model.
    settings = json.loads((step / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"]).state_dict()
    adapter = load_file(step / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "down_proj"}
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b = adapter[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            base[weight] = base[weight] + settings["lora_alpha"] / settings["r"] * (b @ a)
    for name, tensor in expected.items():
        assert_near(base[name], tensor)
    # By PEFT itself.
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    merged = PeftModel.from_pretrained(model, step / "adapter").merge_and_unload().state_dict()
    for name, tensor in expected.items():
        assert_near(merged[name], tensor)


def test_U4_a_mixture_of_experts_is_saved_under_the_names_of_its_kind(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=23, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    runner = trained(tmp_path / "model", UPDATES["full"])
    step = save_checkpoint(tmp_path / "checkpoints", runner, run_epoch=1)
    assert set(load_file(step / "model.safetensors")) == names
    again = trained(tmp_path / "model", UPDATES["full"], steps=0)
    assert load_checkpoint(tmp_path / "checkpoints", again).version == 2
    left, right = (policy_of(which).checkpoint_tensors() for which in (runner, again))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# -- U1: the dry run

ROOMY = "gpu=80GiB,gpus=8,host=512GiB,disk=2TiB"


@pytest.fixture
def no_task(monkeypatch):
    """The task is not tried: its helper takes seconds to start."""
    monkeypatch.setattr(dry_run, "_task", lambda config, *rest: [("path", config.task.path)])


def dry(main, *arguments):
    """(exit code, what a dry run printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*map(str, arguments), "--dry-run"])
    return code, out.getvalue()


def big_model(folder):
    """Headers of a model of 7.6 billion parameters, whose weights nobody has written."""
    make_model_folder(folder)
    hidden, inner, layers, vocab = 3584, 18944, 28, 152064
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes, **heads}))
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for name, out in (("q_proj", hidden), ("k_proj", 512), ("v_proj", 512), ("o_proj", hidden)):
            shapes[f"{place}.self_attn.{name}.weight"] = [out, hidden]
        shapes |= {f"{place}.mlp.{name}.weight": [inner, hidden] for name in ("gate_proj", "up_proj")}
        shapes[f"{place}.mlp.down_proj.weight"] = [hidden, inner]
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
    return folder


def test_U1_the_task_is_loaded_and_one_rendered_prompt_is_shown(tmp_path, config_file):
    code, text = dry(learner.main, config_file, f"model.path={make_model_folder(tmp_path / 'model')}")
    assert code == 0 and text.splitlines()[-1] == "fits"
    assert re.search(r"training example \d+, \d tokens +\d+\+\d+=\n", text)
    assert re.search(r"largest token id +\d+, the model knows 50\n", text)
    assert re.search(r"reward of an empty completion +exact 0\n", text)


def test_U1_a_task_that_cannot_be_made_is_a_user_error_of_the_dry_run(tmp_path, config_file):
    model = f"model.path={make_model_folder(tmp_path / 'model')}"
    code, message = next(commands(config_file, model, "task.args={digits: 99}"))
    assert code == 2 and "digits" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "hardware", "words"),
    [
        ([], ROOMY, "of memory of each GPU are needed, 80.00 GiB are there"),
        (["model.dtype=bfloat16", "update.what=lora"], "gpu=16GiB,host=512GiB", "memory of each GPU"),
        (["learner.device=cpu"], "host=64GiB", "of host memory are needed, 64.00 GiB are there; lower"),
        (["learner.device=cpu"], "host=512GiB,disk=71GiB", "of disk are needed, 71.00 GiB are there; lower checkpoint"),
        (["learner.device=cuda"], "gpus=0,host=512GiB", "learner needs 1 GPUs, there are 0; set learner.device=cpu"),
        (["learner.device=cuda"], "gpus=1,host=512GiB", "how much memory a GPU has is not known here"),
    ],
)
def test_U1_what_does_not_fit_is_exit_code_2_with_what_to_change(
    tmp_path, config_file, no_task, arguments, hardware, words
):
    folder = big_model(tmp_path / "model")
    code, text = dry(learner.main, config_file, f"model.path={folder}", *arguments, "--for", hardware)
    assert code == 2
    assert text.splitlines()[-1].startswith("does not fit: ") and words in text


def test_U1_what_fits_a_named_machine_fits_on_a_login_node_without_a_gpu(tmp_path, config_file, no_task):
    folder = big_model(tmp_path / "model")
    lora = ["model.dtype=bfloat16", "update.what=lora", "learner.device=cuda", "generator.device=cuda"]
    lora.append("learner.micro_batch_tokens=1024")
    for main in (learner.main, generator.main):
        code, text = dry(main, config_file, f"model.path={folder}", *lora, "learner.cpus=[97]", "--for", ROOMY)
        assert (code, text.splitlines()[-1]) == (0, "fits the hardware that --for names")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert learner.main([config_file, f"model.path={folder}", "--for", "gpu=lots"]) == 2
        assert learner.main([config_file, f"model.path={folder}", "--dry-run", "--for", "gpu=lots"]) == 2
    assert "--for names the machine that --dry-run compares with" in err.getvalue()
    assert "'gpu=lots' is none of gpu=SIZE" in err.getvalue()


def test_U1_a_cache_without_room_for_one_sequence_does_not_fit(tmp_path, config_file, no_task):
    folder = big_model(tmp_path / "model")
    cpu = ["generator.device=cpu", "generator.kv_cache_gib=0.001", "--for", "host=512GiB"]
    code, text = dry(generator.main, config_file, f"model.path={folder}", *cpu)
    assert code == 2 and "the KV cache holds no sequence of model.max_length=64 tokens" in text
    gpu = ["model.dtype=bfloat16", "generator.gpu_memory_fraction=0.3", "--for", "gpu=80GiB,host=512GiB"]
    code, text = dry(generator.main, config_file, f"model.path={folder}", *gpu)
    assert code == 2 and "raise generator.gpu_memory_fraction" in text


def test_U1_each_way_of_training_has_its_own_forecast(tmp_path, config_file):
    folder = find_model(str(big_model(tmp_path / "model")))

    def gib(*overrides, place="GPU"):
        overrides = (f"model.path={folder.folder}", "learner.micro_batch_tokens=1024", *overrides)
        needs = learner_needs(load_config(config_file, overrides), folder, on_gpu=True)
        return sum(need.num_bytes for need in needs if need.place == place) / 2**30

    bf16 = "model.dtype=bfloat16"
    lora, part = ("update.what=lora", bf16), ("update.what=partial", "update.names=[model.layers.27.*]", bf16)
    full = gib(bf16)
    assert 150 < full < 220  # 7.6 billion parameters: 16 bytes each, 6 for snapshots
    assert gib(*part) < 0.4 * full and gib(*lora) < 0.35 * full
    assert gib(bf16, "algorithm.kl_coef=0.1") == pytest.approx(full + 2 * 7.6, rel=0.02)
    assert gib(*lora, "algorithm.kl_coef=0.1") == gib(*lora)  # the reference is the model with adapters off
    assert gib(bf16, "algorithm.name=ppo") > full + 15 * 7  # 16 bytes of each, without the head, in GiB
    shared = gib(bf16, "algorithm.name=ppo", "critic.trunk=shared")
    assert shared == pytest.approx(full, rel=0.01)
    assert gib(bf16, place="disk") > 250 and gib(*lora, place="disk") < 80
    assert gib(bf16, "learner.micro_batch_tokens=65536") > full + 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full, float32", "partial", "lora"])
def test_U1_the_forecast_is_within_a_tenth_of_what_a_trainer_takes(name):
    """A model of 29 million parameters, trained on the CPU in a process of its own: the peak of its memory."""
    found = in_a_process(CONFIGURATIONS[name])
    assert 0.9 < found["forecast"] / found["measured"] < 1.1, found


# -- U8, U9: evaluation without prompts, threads, public names, the wheel


def test_U8_no_held_out_prompts_mean_no_evaluation_whatever_eval_every_says():
    config = load("eval.every=5", "eval.prompts=0")
    assert (config.eval.every, config.eval.prompts) == (5, 0)
    assert not any(evaluation_due(version, 100, 5, 0, set()) for version in range(101))


def in_thread(function):
    """What `function` returned or raised in a thread that is not the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_U9_signals_stay_with_the_main_thread_and_a_stop_can_be_asked_for_from_any():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = in_thread(StopSignal)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert stop.received is None and not select.select([stop.fd], [], [], 0)[0]
    for _ in range(2):
        stop.request()
    assert stop.received == signal.SIGTERM and select.select([stop.fd], [], [], 0)[0]


def test_U9_both_daemons_can_be_started_outside_the_main_thread(tmp_path, monkeypatch):
    model = make_model_folder(tmp_path / "model")
    started = []
    monkeypatch.setattr("asyncrl.desk.daemon.open_run", lambda config: started.append(config) or 1 / 0)
    monkeypatch.setattr(
        "asyncrl.generator.assembly.build_generator", lambda config, *rest: started.append(config) or 1 / 0
    )
    config = load(f"model.path={model}", f"run.dir={tmp_path / 'run'}")
    for run in (asyncrl.run_learner, asyncrl.run_generator):
        with pytest.raises(ZeroDivisionError):  # it came as far as the run itself
            in_thread(lambda run=run: run(config))
    assert len(started) == 2
    with pytest.raises(UserError, match="there is no such folder"):
        in_thread(lambda: asyncrl.run_learner(load("model.path=/none", f"run.dir={tmp_path / 'run'}")))


def test_U9_public_names_are_there_and_import_nothing_before_they_are_asked_for():
    code = (
        "import sys, asyncrl; print([m for m in ('torch', 'yaml', 'zmq', 'numpy') if m in sys.modules], dir(asyncrl))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and "'run_learner'" in done.stdout
    assert all(getattr(asyncrl, name) is not None for name in asyncrl.__all__)
    assert set(asyncrl.__all__) == {"__version__", *asyncrl._PLACES}
    assert asyncrl.load_config is load_config
    stub = (ROOT / "asyncrl" / "__init__.pyi").read_text()
    assert all(f" as {name}\n" in stub for name in asyncrl.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        asyncrl.nothing  # noqa: B018


def test_U9_a_shipped_configuration_is_found_by_its_name(tmp_path, monkeypatch, no_task):
    monkeypatch.chdir(tmp_path)
    model = f"model.path={make_model_folder(tmp_path / 'model')}"
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        code, text = dry(learner.main, name, model, "--for", ROOMY)
        assert code == 0 and "name: quickstart" in text
    (tmp_path / "quickstart.yaml").write_text("run: {name: mine}\nmodel: {max_length: 300}\n")
    assert "name: mine" in dry(learner.main, "quickstart.yaml", model, "--for", ROOMY)[1]


@pytest.mark.slow
def test_U9_the_wheel_has_types_configurations_and_the_warm_up(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "asyncrl", source / "asyncrl", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=200)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=200)
    python = tmp_path / "venv" / "bin" / "python"
    code = "import asyncrl, asyncrl.cli.common as c; print(asyncrl.__file__, c.command('learner', ['--version'], None))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert str(site) in done.stdout and done.stdout.endswith(" 0\n")
    package = site / "asyncrl"
    assert (package / "py.typed").is_file() and (package / "__init__.pyi").is_file()
    shipped = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert shipped and {path.name for path in (package / "configs").glob("*.yaml")} == shipped
    assert (package / "cli" / "warmup.py").is_file()
    assert {path.name for path in (package / "report" / "page").glob("page.*")} == {"page.css", "page.js"}
    (metadata,) = site.glob("asyncrl-*.dist-info/entry_points.txt")
    assert "asyncrl-warmup = asyncrl.cli.warmup:main" in metadata.read_text()


# -- U10: the benchmark of a user's own task


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """A folder with a task module, a configuration and a model, as the working directory."""
    folder = tmp_path / "mine"
    folder.mkdir()
    make_tiny_model(folder / "model", tied=True)
    shutil.copy(ROOT / "tests" / "e2e" / "letters_task.py", folder / "my_letters.py")
    settings = {
        "run": {"name": "mine"},
        "model": {"path": "model", "max_length": 64},
        "task": {"path": "my_letters:Letters"},
        "sampling": {"max_new_tokens": 8, "group_size": 2},
        "learner": {"groups_per_step": 2, "micro_batch_tokens": 256, "device": "cpu"},
        "generator": {"max_sequences": 8, "kv_cache_gib": 0.1, "device": "cpu"},
        "eval": {"prompts": 0},
    }
    (folder / "my.yaml").write_text(json.dumps(settings))
    monkeypatch.chdir(folder)
    return folder


def test_U10_the_benchmark_keeps_a_users_model_and_task_and_their_working_directory(own_task, monkeypatch):
    started = []

    def popen(command, **kwargs):
        started.append((command, kwargs))
        raise ZeroDivisionError

    monkeypatch.setattr(async_vs_sync.subprocess, "Popen", popen)
    monkeypatch.setattr(sys, "argv", ["async_vs_sync", "--config", "my.yaml", "--quick"])
    with pytest.raises(ZeroDivisionError):
        async_vs_sync.main()
    ((command, kwargs),) = started
    assert kwargs.get("cwd") in (None, str(own_task), own_task)
    assert str(own_task / "my.yaml") in command
    assert not [argument for argument in command if str(argument).startswith("model.path")]
    assert Path("runs/benchmarks") == common.RESULTS, "nothing tracked is written unless --results names its folder"


@pytest.mark.slow
@pytest.mark.timeout(650)
def test_U10_the_benchmark_runs_a_users_own_task_outside_the_repository(own_task):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.studies.async_vs_sync", "--config", "my.yaml", "--quick"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((own_task / "runs" / "benchmarks" / "async_vs_sync.quick.json").read_text())
    assert record["options"]["model"] is None
    check_quick_record(record, done.stdout)


# -- U4: exports of any step


def export_of(config_file, tmp_path, *arguments):
    """(exit code, stdout, stderr) of the learner's --export."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = learner.main([config_file, "model.path=anything", f"run.dir={tmp_path / 'run'}", *map(str, arguments)])
    return code, out.getvalue().strip(), err.getvalue()


def test_U4_any_step_is_exported_as_a_model_that_takes_no_further_disk(tmp_path, config_file, model_folder):
    runner = trained(model_folder, UPDATES["full"], steps=1)
    for step in range(2, 4):
        runner.step(random_groups(3, 4, seed=step))
        save_checkpoint(tmp_path / "run" / "checkpoints", runner, run_epoch=1, keep=5)
    code, folder, _ = export_of(config_file, tmp_path, "--export", 2)
    assert (code, folder) == (0, str(tmp_path / "run" / "exports" / "step_2"))
    exported, checkpoint = Path(folder), tmp_path / "run" / "checkpoints" / "step_2"
    assert {"trainer", "desk_state.bin", "MANIFEST.json"}.isdisjoint(path.name for path in exported.iterdir())
    assert (exported / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert not (exported / "config.json").samefile(checkpoint / "config.json")
    shutil.rmtree(checkpoint)
    assert AutoTokenizer.from_pretrained(exported).eos_token == "<end>"
    AutoModelForCausalLM.from_pretrained(exported)
    code, folder, _ = export_of(config_file, tmp_path, "--export", "latest")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in policy_of(runner).checkpoint_tensors().items())
    code, _, message = export_of(config_file, tmp_path, "--export", 7)
    assert code == 2 and "give a number or `latest`; there are: step_3" in message
    assert export_of(config_file, tmp_path, "--export", "3", "--adapters")[0] == 2
    (tmp_path / "run" / "checkpoints" / "step_3" / "model.safetensors").write_bytes(b"damaged")
    assert export_of(config_file, tmp_path, "--export", 3)[0] == 6


def test_U4_adapters_are_exported_alone_on_request(tmp_path, config_file, model_folder):
    runner = trained(model_folder, UPDATES["lora"], steps=1)
    save_checkpoint(tmp_path / "run" / "checkpoints", runner, run_epoch=1)
    code, folder, _ = export_of(config_file, tmp_path, "--export", "latest", "--adapters")
    assert code == 0 and folder.endswith("step_1_adapter")
    assert {path.name for path in Path(folder).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    merged, expected = model.merge_and_unload().state_dict(), merged_state(policy_of(runner).model)
    for name, tensor in expected.items():
        assert_near(merged[name], tensor)


def test_U4_a_checkpoint_of_an_older_release_says_why_it_cannot_be_exported(tmp_path, config_file):
    shutil.copytree(ROOT / "tests/golden/data/old_run", tmp_path / "run")
    code, _, message = export_of(config_file, tmp_path, "--export", "latest")
    assert code == 2 and "of a release that wrote no model into checkpoints" in message


class TextTask(Letters):
    """A task whose constructor declares a text."""

    def __init__(self, data: str = "", size: float = 1.0, other=None):
        super().__init__()
        self.given = (data, size, other)


def test_D9_an_argument_that_a_task_declares_as_text_is_never_a_number():
    path = f"{__name__}:TextTask"
    for written in ("1.10", "2024_01_01", "off", "-"):
        with pytest.raises(TaskError, match=r"task\.args\.data=.* is text for TextTask, and YAML reads it as"):
            load_task(path, load(f"task.args.data={written}").task.args)
    task = load_task(path, load("task.args.data='1.10'", "task.args.size=1.10", "task.args.other=off").task.args)
    assert task.given == ("1.10", 1.1, False)
    with pytest.raises(ConfigError, match="pattern=1.1 must be text"):
        check_rewards(load("reward.parts.form={kind: format, pattern: 1.10}"), "learner")


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null]}'])
def test_D7_a_generation_config_that_no_engine_could_read_is_refused_at_the_start(tmp_path, config_file, content):
    folder = make_model_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    for code, message in commands(config_file, f"model.path={folder}"):
        assert code == 2 and "generation_config.json" in message and "Traceback" not in message


@pytest.mark.parametrize("settings", [*GENERATION, {"eos_token_id": 1}, {"eos_token_id": [1, 2]}, {}])
def test_D7_end_tokens_are_found_whatever_else_the_generation_config_says(model_folder, settings):
    (model_folder / "generation_config.json").write_text(json.dumps(settings))
    check_generation_config(model_folder, "model.path=m")
    assert 1 in stop_token_ids(str(model_folder), AutoTokenizer.from_pretrained(model_folder))


def test_D7_a_tokenizer_that_must_be_converted_is_refused_at_the_start(tmp_path, config_file):
    folder = make_model_folder(tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    for code, message in commands(config_file, f"model.path={folder}"):
        assert code == 2 and "has no tokenizer.json; convert its tokenizer" in message

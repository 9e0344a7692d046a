"""A start that is safe, and checkpoints that a user can use: each test is named after the fault that it holds."""

import contextlib
import io
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from asyncrl.cli import generator, learner
from asyncrl.config import ModelConfig, UpdateConfig
from asyncrl.config.loading import load_config, to_yaml
from asyncrl.errors import ConfigError
from asyncrl.host.addresses import is_loopback, is_wildcard, rollout_address
from asyncrl.host.model_config import known_context
from asyncrl.host.model_folder import find_model
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.engines import export
from asyncrl.trainer.engines.lora import merged_state
from asyncrl.trainer.engines.policy import load_policy
from tests.conftest import MAX_LENGTH, make_tiny_model, reference_logprobs, start_engine
from tests.model_folders import make_model_folder
from tests.tolerances import assert_near
from tests.trainer.test_step import make_trainer
from tests.trainer.tiny import policy_of, random_groups

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
    assert [code for code, _ in commands(config_file, f"model.path={folder}")] == [0, 0]


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
    assert [code for code, _ in commands(*given, f"model.max_length={context}")] == [0, 0]
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
    assert [code for code, _ in commands(config_file, f"model.path={step}", "model.max_length=64")] == [0, 0]
    assert find_model(str(step)).num_parameters() == find_model(str(model_folder)).num_parameters()
    assert not [path for path in step.glob("*.safetensors") if not path.name.startswith("model")]
    again = trained(model_folder, UPDATES[name], steps=0)
    assert load_checkpoint(tmp_path / "checkpoints", again).version == 2
    left, right = (policy_of(which).checkpoint_tensors() for which in (runner, again))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_U4_large_models_are_cut_into_files_with_an_index(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 100_000)
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

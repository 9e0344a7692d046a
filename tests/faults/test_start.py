"""A start that is safe, and checkpoints that a user can use: each test is named after the fault that it holds."""

import contextlib
import io
import json

import pytest

from asyncrl.cli import generator, learner
from asyncrl.config.loading import load_config, to_yaml
from asyncrl.errors import ConfigError
from asyncrl.host.addresses import is_loopback, is_wildcard, rollout_address
from asyncrl.host.model_config import known_context
from tests.conftest import MAX_LENGTH, make_tiny_model, reference_logprobs, start_engine
from tests.model_folders import make_model_folder
from tests.tolerances import assert_near

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

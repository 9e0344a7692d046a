"""Configurations: precedence, unknown keys, wrong values, keys that do not fit together."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig

from asyncrl.config import Config, host_checks
from asyncrl.config.checks import RULES, check, check_values, largest_group_bytes
from asyncrl.config.host_checks import check_host, weight_backends
from asyncrl.config.keys import keys, sections, value_of
from asyncrl.config.loading import load_config, nearest_key, to_yaml
from asyncrl.config.schema import RENAMED_KEYS
from asyncrl.errors import ConfigError, ModelError
from asyncrl.link.messages import GroupResult
from tests.model_folders import make_model_folder

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
GIVEN = ["model.path=m"]


def load(*overrides):
    return load_config(None, [*GIVEN, *overrides])


def refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.fixture
def model_folder(tmp_path):
    return make_model_folder(tmp_path / "model")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


# -- precedence and form


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads(path):
    assert load_config(path).run.name == path.stem


def test_the_four_promised_files_are_shipped():
    assert {path.stem for path in SHIPPED} >= {"quickstart", "arithmetic", "gsm8k_tiny", "gsm8k_qwen_gpu"}


def test_command_line_wins_over_file_and_file_over_defaults(write):
    path = write("model: {path: m}\nlearner: {lr: 1e-4, grad_clip: 0.5}\n")
    config = load_config(path, ["learner.lr=3e-4"])
    assert (config.learner.lr, config.learner.grad_clip, config.learner.weight_decay) == (3e-4, 0.5, 0.0)


def test_the_last_of_two_overrides_wins():
    assert load("run.steps=3", "run.steps=4").run.steps == 4


def test_another_key_can_be_named_in_a_value():
    config = load("run.name=blue", "learner.cpus=${generator.cpus}", "generator.cpus=[1]")
    assert (config.run.dir, config.learner.cpus) == ("runs/blue", [1])


def test_after_loading_there_are_only_plain_python_objects(write):
    config = load_config(write("task: {args: {sizes: [1, {deep: 2}]}}"), [*GIVEN, "learner.cpus=[0]"])

    def walk(value):
        assert not isinstance(value, (DictConfig, ListConfig))
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for child in children:
            walk(child)

    for key in keys():
        walk(value_of(config, key.name))
    assert type(config) is Config
    assert config.task.args == {"sizes": [1, {"deep": 2}]}


def test_task_arguments_are_free_and_merge_with_those_of_the_file(write):
    config = load_config(write("task: {args: {digits: 2, deep: {a: 1}}}"), [*GIVEN, "task.args.deep.b=x"])
    assert config.task.args == {"digits": 2, "deep": {"a": 1, "b": "x"}}


def test_an_empty_text_can_be_given_on_the_command_line():
    assert load("generator.id=").generator.id == ""


def test_printed_yaml_loads_back_to_an_equal_configuration(write):
    config = load("run.name=blue", "task.args={a: [1, 2]}", "learner.lr=3e-7", "learner.cpus=[0, 1]")
    text = to_yaml(config)
    assert "${" not in text
    assert load_config(write(text)) == config


def test_an_empty_file_means_defaults(write):
    assert load_config(write("# nothing\n"), GIVEN) == load()


# -- unknown keys


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("learner.learning_rate", "learner.lr"),
        ("lr", "learner.lr"),
        ("lerner.lr", "learner.lr"),
        ("learner.group_size", "sampling.group_size"),
        ("staleness.max_agee", "staleness.max_age"),
        ("run..name", "run.name"),
        ("learner.lr.x", "learner.lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(wrong, nearest):
    message = refusal(f"{wrong}=1")
    assert f"unknown key {wrong} (command line); the nearest is {nearest}" in message


def test_an_unknown_key_in_a_file_is_named_with_its_line(write):
    path = write("model:\n  path: m\nlearner:\n  # a comment\n  lrr: 1e-3\n")
    with pytest.raises(ConfigError, match=r"unknown key learner\.lrr \(.*run\.yaml, line 5\).*learner\.lr\b"):
        load_config(path)


def test_an_unknown_section_is_noticed_even_when_it_is_empty(write):
    with pytest.raises(ConfigError, match="unknown key lerner"):
        load_config(write("model: {path: m}\nlearner: {}\nlerner: {}\n"))


def test_all_unknown_keys_are_named_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("models: {path: m}\nrun: {step: 3}\n"), ["learner.lrr=1"])
    assert len(str(caught.value).splitlines()) == 3


@given(st.text(alphabet="abcdefglmnoprstuy._", min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_wrong_name_gets_a_valid_suggestion(name):
    assert nearest_key(name) in {key.name for key in keys()}


# -- renamed keys


def test_the_old_name_of_a_key_is_refused_with_the_new_one(monkeypatch, write):
    monkeypatch.setitem(RENAMED_KEYS, "learner.learning_rate", "learner.lr")
    message = "learner.learning_rate (command line) is called learner.lr now; set that key"
    assert refusal("learner.learning_rate=1") == message
    with pytest.raises(ConfigError, match=r"learner\.learning_rate \(.*line 1\) is called learner\.lr now"):
        load_config(write("learner: {learning_rate: 1}"), GIVEN)


def test_new_names_of_renamed_keys_exist_and_old_ones_do_not():
    known = {key.name for key in keys()}
    assert set(RENAMED_KEYS.values()) <= known
    assert not set(RENAMED_KEYS) & known


# -- wrong values


@pytest.mark.parametrize(
    ("override", "value", "rule"),
    [
        ("learner.lr=abc", "abc", "number"),
        ("learner.lr=0", "0.0", "above 0.0"),
        ("learner.lr=.nan", "nan", "a finite number"),
        ("learner.lr=.inf", "inf", "a finite number"),
        ("run.steps=1.5", "1.5", "integer"),
        ("run.steps=0", "0", "at least 1"),
        ("run.steps=true", "True", "integer"),
        ("run.steps=null", "null", "integer"),
        ("sampling.repeatable=maybe", "maybe", "true or false"),
        ("generator.gpu_memory_fraction=1.5", "1.5", "at most 1.0"),
        ("model.dtype=float16", "float16", "one of float32, bfloat16"),
        ("learner.cpus=0", "0", "list of integers"),
        ("learner.cpus=[a]", "['a']", "list of integers"),
        ("task.args=[1]", "[1]", "mapping"),
    ],
)
def test_a_wrong_value_is_refused_with_value_rule_and_default(override, value, rule):
    name = override.partition("=")[0]
    message = refusal(override)
    assert message.startswith(f"{name}={value} (command line): must be ")
    assert rule in message
    assert "The default is" in message


def test_a_wrong_value_in_a_file_is_named_with_its_line(write):
    with pytest.raises(ConfigError, match=r"run\.steps=-1 \(.*run\.yaml, line 2\): must be at least 1"):
        load_config(write("run:\n  steps: -1\n"), GIVEN)


def test_every_declared_bound_is_enforced():
    """The slow reference: step over each bound of each key by itself."""
    step_over = {
        "minimum": lambda bound: bound - 1,
        "above": lambda bound: bound,
        "maximum": lambda bound: bound + 1,
        "choices": lambda bound: "no such choice",
    }
    bounds = [
        (key, entry.name, bound)
        for key in keys()
        for entry in dataclasses.fields(key.bounds)
        if (bound := getattr(key.bounds, entry.name)) not in (None, ())
    ]
    assert len(bounds) > 40
    for key, name, bound in bounds:
        config = Config()
        setattr(getattr(config, key.section), key.name.partition(".")[2], step_over[name](bound))
        problems = check_values(config)
        assert len(problems) == 1 and problems[0].startswith(f"{key.name}="), (key.name, name)


def test_a_section_is_not_a_value():
    assert "learner is a section" in refusal("learner=3")


def test_a_section_left_empty_is_explained(write):
    with pytest.raises(ConfigError, match=r"learner \(.*line 1\) is an empty section"):
        load_config(write("learner:\n"), GIVEN)


@pytest.mark.parametrize("override", ["run.steps", "=3", ""])
def test_what_is_not_key_value_is_refused(override):
    assert "not key=value" in refusal(override)


def test_broken_yaml_is_refused_with_its_place(write):
    with pytest.raises(ConfigError, match=r"not valid YAML.*line 2"):
        load_config(write("run:\n  name: [1\n"))


def test_a_file_that_is_a_list_is_refused(write):
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(write("- run\n"))


def test_a_missing_file_names_its_neighbours(write):
    path = write("run: {}\n")
    with pytest.raises(ConfigError, match=r"no such configuration file; in that folder there are: .*run\.yaml"):
        load_config(path.with_name("rnu.yaml"))


def test_a_reference_to_no_key_is_refused():
    assert "run.dir (command line): Interpolation key 'run.nme' not found" in refusal("run.dir=${run.nme}")


def test_a_value_left_open_is_asked_for(write):
    with pytest.raises(ConfigError, match=r"model\.path=\?\?\?.*left to you"):
        load_config(write("model:\n  path: ???\n"))


# -- keys together


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["model.path="], ["model.path is empty", "bin/warmup"]),
        (["run.name=a/b"], ["run.name='a/b'"]),
        (["run.dir="], ["run.dir is empty"]),
        (["generator.id=a b"], ["generator.id='a b'"]),
        (["task.path=gsm8k"], ["task.path='gsm8k'", "module:Class"]),
        (["sampling.max_new_tokens=64", "model.max_length=64"], ["max_new_tokens=64", "max_length=64"]),
        (["sampling.group_size=1"], ["sampling.group_size=1", "2 or more"]),
        (["generator.max_sequences=4"], ["max_sequences=4", "group_size=8"]),
        (["eval.samples=65", "eval.temperature=1"], ["max_sequences=64", "eval.samples=65"]),
        (["eval.samples=4"], ["eval.samples=4 greedy completions", "set eval.temperature above 0"]),
        (["eval.temperature=0.001"], ["eval.temperature=0.001 is below 0.01", "0 for greedy"]),
        (["learner.micro_batch_tokens=512"], ["micro_batch_tokens=512", "max_length=1024"]),
        (["learner.betas=[0.9]"], ["learner.betas=[0.9]"]),
        (["learner.betas=[0.9, 1.0]"], ["learner.betas=[0.9, 1.0]"]),
        (["learner.cpus=[0, 0]"], ["learner.cpus=[0, 0]"]),
        (["generator.cpus=[-1]"], ["generator.cpus=[-1]"]),
        (["learner.threads=2", "learner.cpus=[0]"], ["learner.threads=2", "learner.threads=1"]),
        (["learner.nodes=2", "weights.host=10.0.0.1"], ["learner.port=0", "learner.port"]),
        (["learner.nodes=2", "learner.port=29500"], ["weights.host=127.0.0.1 is loopback"]),
        (["learner.ranks=2", "learner.engine=single"], ["learner.engine=single", "learner.ranks=2", "fsdp"]),
        (
            ["learner.ranks=3", "learner.sequence_parallel=2"],
            ["learner.sequence_parallel=2", "learner.ranks=3", "learner.ranks to a multiple of 2"],
        ),
        (
            ["learner.ranks=3", "learner.replicas=2"],
            ["learner.replicas=2", "the 3 trainer processes", "learner.ranks to a multiple of 2", "divisor of 3"],
        ),
        (
            ["learner.nodes=4", "learner.ranks=3", "learner.replicas=6"],
            ["learner.replicas=6", "a part of one host", "a divisor of learner.nodes"],
        ),
        (["learner.ranks=2", "update.what=lora", "update.lora_sync=merged"], ["lora_sync=merged", "lora_sync=adapter"]),
        (
            ["learner.engine=single", "learner.offload_optimizer=true"],
            ["offload_optimizer=true", "learner.engine=fsdp"],
        ),
        (
            ["learner.device=cpu", "learner.activation_checkpointing=full"],
            ["activation_checkpointing=full", "learner.engine=fsdp"],
        ),
        (["generator.reward_timeout_s=600"], ["reward_timeout_s=600.0", "lease_timeout_s=600.0"]),
        (["transport.max_frame_bytes=8192"], ["transport.max_frame_bytes=8192", "largest possible group"]),
        (["transport.credit_bytes=8192"], ["transport.credit_bytes=8192"]),
        (["generator.outbox_bytes=8192"], ["generator.outbox_bytes=8192"]),
        (["transport.address=127.0.0.1:5770"], ["tcp://HOST:PORT"]),
        (["transport.address=tcp://127.0.0.1"], ["from 1 to 65535"]),
        (["transport.address=tcp://127.0.0.1:0"], ["from 1 to 65535"]),
        (["transport.address=tcp://127.0.0.1:70000"], ["tcp://HOST:PORT"]),
        (["transport.address=tcp://*:5770"], ["listens on every interface"]),
        (["transport.address=tcp://0.0.0.0:5770"], ["listens on every interface"]),
        (["transport.address='tcp://[::]:5770'"], ["listens on every interface"]),
        (["weights.host=0.0.0.0"], ["weights.host='0.0.0.0'", "private address"]),
        (["weights.host=8.8.8.8"], ["weights.host=8.8.8.8", "no authentication"]),
        (["transport.address=tcp://10.0.0.1:5770"], ["weights.host=127.0.0.1 is loopback"]),
        (["learner.http=9100"], ["learner.http=9100", "HOST:PORT", "off"]),
        (["learner.http=127.0.0.1:0"], ["learner.http=127.0.0.1:0"]),
        (["generator.http=0.0.0.0:9100"], ["generator.http=0.0.0.0:9100", "wildcard"]),
        (["generator.http=8.8.8.8:9100"], ["generator.http=8.8.8.8:9100", "public address"]),
        (["learner.http=127.0.0.1:9", "generator.http=localhost:9"], ["are one place"]),
        (
            ["transport.server_key_file=k"],
            ["transport.server_key_file is set", "transport.allowed_keys_file"],
        ),
        (["transport.client_key_file=k"], ["transport.client_key_file is set", "server_public_key_file"]),
        (["weights.backend=nccl", "learner.device=cpu"], ["weights.backend=nccl", "learner.device=cpu"]),
        (
            ["weights.backend=ipc", "learner.device=cuda", "generator.device=cpu"],
            ["weights.backend=ipc", "learner.device=cuda", "generator.device=cpu"],
        ),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(overrides, names):
    message = refusal(*overrides)
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["staleness.max_age=0", "sampling.repeatable=false"],
        ["model.dtype=bfloat16", "learner.device=cpu", "generator.device=cpu"],
        ["weights.backend=gloo", "learner.device=cuda", "generator.device=cuda"],
        ["weights.backend=ipc", "learner.device=cpu", "generator.device=cpu"],
        ["weights.backend=ipc", "learner.device=cuda", "generator.device=auto"],
        ["transport.address='tcp://[::1]:5770'"],
        ["transport.address=tcp://localhost:5770"],
        ["learner.http=off", "generator.http=[::1]:9100"],
        ["learner.http=10.0.0.1:9100", "generator.http=10.0.0.1:9101"],
        ["eval.prompts=0"],
    ],
)
def test_unusual_but_sound_settings_are_allowed(overrides):
    load(*overrides)


OPEN = ["transport.address=tcp://10.0.0.1:5770", "weights.host=10.0.0.1"]


def test_an_open_address_needs_curve_keys():
    message = refusal(*OPEN)
    assert "is not loopback, so CURVE keys are required" in message


@pytest.mark.parametrize(
    "pair",
    [
        ["transport.server_key_file=a", "transport.allowed_keys_file=b"],
        ["transport.server_public_key_file=a", "transport.client_key_file=b"],
    ],
)
def test_the_keys_of_either_role_open_an_address(pair):
    load(*OPEN, *pair)


def test_all_broken_rules_are_named_at_once():
    assert len(refusal("sampling.group_size=1", "learner.betas=[0.9]").splitlines()) == 2


def test_every_rule_lets_the_defaults_pass_once_a_model_is_given():
    config = Config()
    config.model.path = "m"
    check(config)
    assert [rule(config) for rule in RULES] == [None] * len(RULES)


def test_the_largest_group_bound_covers_a_real_message():
    config = load("sampling.group_size=4", "sampling.max_new_tokens=500", "staleness.max_age=2")
    spans = config.staleness.max_age + 2
    rollout = {
        "tokens": bytes(4 * 500),
        "logprobs": bytes(4 * 500),
        "spans": bytes(24 * spans),
        "finish": "length",
        "reward": 0.5,
        "parts": {"correct": 1.0, "format": 1.0},
    }
    group = GroupResult(1, 1, "train", 1, 0, bytes(4 * 524), [rollout] * 4)
    import msgpack

    packed = len(msgpack.packb([getattr(group, entry.name) for entry in dataclasses.fields(group)]))
    assert packed < largest_group_bytes(config) < 2 * packed


# -- this machine


def test_a_missing_model_folder_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ModelError, match=r"model\.path=.*there is no such folder.*bin/warmup"):
        check_host(load(f"model.path={tmp_path / 'none'}"), "learner")


def test_a_hub_name_is_found_in_the_local_cache_and_else_asked_for(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = load("model.path=org/tiny")
    with pytest.raises(ModelError, match="hf download org/tiny"):
        check_host(config, "learner")
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(model_folder)
    check_host(config, "learner")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no .safetensors"),
    ],
)
def test_an_incomplete_model_folder_is_refused(model_folder, missing, words):
    (model_folder / missing).unlink()
    with pytest.raises(ModelError, match=words):
        check_host(load(f"model.path={model_folder}"), "generator")


def test_a_shard_that_the_index_names_must_be_there(model_folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-2\.safetensors, which is missing"):
        check_host(load(f"model.path={model_folder}"), "learner")


def test_each_role_is_asked_for_its_own_keys(model_folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    pair = [f"transport.server_key_file={tmp_path}/a", f"transport.allowed_keys_file={tmp_path}/b"]
    config = load(*OPEN, *pair, f"model.path={model_folder}")
    check_host(config, "learner")
    with pytest.raises(ConfigError, match="a generator needs CURVE keys"):
        check_host(config, "generator")
    (tmp_path / "b").unlink()
    with pytest.raises(ConfigError, match=r"transport\.allowed_keys_file=.*no such file"):
        check_host(config, "learner")


def test_cpus_that_the_host_does_not_have_are_refused(model_folder):
    config = load("learner.cpus=[4095]", f"model.path={model_folder}")
    check_host(config, "generator")
    with pytest.raises(ConfigError, match=r"learner\.cpus=\[4095\]: this process may use only CPUs"):
        check_host(config, "learner")


def test_an_engine_spread_over_more_gpus_than_are_visible_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr(host_checks, "visible_gpus", lambda: ["a", "b"])
    monkeypatch.setattr(host_checks, "has_gpu", lambda: True)
    for size, problem in ((2, False), (3, True)):
        config = load(f"generator.tensor_parallel_size={size}", f"model.path={model_folder}")
        check_host(config, "learner")
        with pytest.raises(ConfigError, match="=3 needs as many GPUs, 2 are visible") if problem else nullcontext():
            check_host(config, "generator")


def test_memory_is_shared_with_daemons_of_the_learners_host_only(model_folder):
    check_host(load("weights.backend=ipc", f"model.path={model_folder}"), "generator")
    elsewhere = ["weights.host=10.254.253.252", f"model.path={model_folder}"]  # not on loopback, nobody's address here
    check_host(load("weights.backend=gloo", *elsewhere), "generator")
    for role in ("learner", "generator"):
        with pytest.raises(ConfigError, match=r"weights\.host=10\.254\.253\.252 is no address of this host"):
            check_host(load("weights.backend=ipc", *elsewhere), role)


@pytest.mark.parametrize(
    ("backend", "learner", "generator", "gpu_here", "expected"),
    [
        ("auto", "auto", "auto", True, "nccl, or ipc on the learner's own GPU (auto)"),
        ("auto", "auto", "auto", False, "gloo (auto)"),
        ("auto", "cuda", "cuda", False, "nccl, or ipc on the learner's own GPU (auto)"),
        ("auto", "cuda", "auto", True, "nccl, or ipc on the learner's own GPU (auto)"),
        ("auto", "cuda", "cpu", True, "gloo (auto)"),
        ("auto", "auto", "cpu", True, "gloo (auto)"),
        ("auto", "cpu", "cuda", True, "gloo (auto)"),
        ("auto", "cpu", "auto", True, "gloo (auto)"),
        ("ipc", "cuda", "cuda", True, "ipc"),
        ("gloo", "cuda", "cuda", True, "gloo"),
    ],
)
def test_words_for_the_backend_follow_the_devices(backend, learner, generator, gpu_here, expected):
    config = load(f"weights.backend={backend}", f"learner.device={learner}", f"generator.device={generator}")
    assert weight_backends(config, gpu_here=gpu_here) == expected


# -- the catalogue


def test_every_key_has_a_sentence_and_a_known_type():
    for key in keys():
        assert key.sentence.endswith("."), key.name
        assert key.type_name != "mapping" or key.is_open, key.name
    assert all(sections().values())


def test_the_choices_are_those_that_the_formulas_know():
    from asyncrl.algorithms.kl import KL_ESTIMATORS
    from asyncrl.algorithms.losses import AGGREGATIONS
    from asyncrl.algorithms.value_targets import VALUE_LOSSES
    from asyncrl.config.methods import KL_ESTIMATORS_BY_PLACE

    choices = {key.name: key.bounds.choices for key in keys()}
    assert set(choices["algorithm.kl_estimator"]) - {"auto", "k3_weighted"} == set(KL_ESTIMATORS)
    assert {name for place in KL_ESTIMATORS_BY_PLACE.values() for name in place} < set(
        choices["algorithm.kl_estimator"]
    )
    assert choices["algorithm.aggregation"] == AGGREGATIONS
    assert choices["critic.loss"] == VALUE_LOSSES

"""How `asyncrl run` divides a host: nobody gets what another has, and what the user wrote stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncrl.cli import forecast
from asyncrl.cli import main as command
from asyncrl.cli.hardware import parse_hardware
from asyncrl.cli.launch.split import DividedHost, split_host, visible_gpus
from asyncrl.config.loading import load_config, written_values
from asyncrl.errors import ConfigError
from asyncrl.host.model_folder import find_model
from tests.model_folders import make_model_folder, make_published_model

ROOT = Path(__file__).parents[2]
ON_GPUS = ["model.dtype=bfloat16", "learner.device=cuda", "generator.device=cuda"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_published_model(folder / name, name) for name in ("0.5B", "4B", "8B")}


def split(folder, hardware, *settings, cores=8, count=None, config_file=None):
    given = [f"model.path={folder}", "task.path=a:B", *settings]
    machine = parse_hardware(hardware)
    host = DividedHost(machine, cores, tuple(map(str, range(machine.gpus))))
    config_file = config_file or folder.parent / "empty.yaml"
    if not config_file.exists():
        config_file.write_text("")
    config = load_config(config_file, given)
    return split_host(config, written_values(config_file, given).keys(), find_model(config.model.path), host, count)


def setting(place, name):
    values = [text.partition("=")[2] for text in place.settings if text.startswith(f"{name}=")]
    return values[-1] if values else None


def gpus_of(place):
    return place.environment["CUDA_VISIBLE_DEVICES"].split(",")


# -- GPUs


@pytest.mark.parametrize("size", ["0.5B", "4B", "8B"])
@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_no_gpu_has_two_owners_and_each_side_has_what_it_was_told(models, size, gpus):
    made = split(models[size], f"gpu=80GiB,gpus={gpus}", *ON_GPUS)
    owned = [name for place in (made.learner, *made.generators) for name in gpus_of(place)]
    assert len(set(owned)) == len(owned) <= gpus
    assert set(owned) <= {str(number) for number in range(gpus)}
    assert len(gpus_of(made.learner)) == int(setting(made.learner, "learner.ranks") or 1)
    for generator in made.generators:
        assert len(gpus_of(generator)) == int(setting(generator, "generator.tensor_parallel_size"))
    assert f"{gpus} GPUs" in made.line


def test_a_small_model_gives_the_learner_a_quarter_and_generators_one_gpu_each(models):
    made = split(models["0.5B"], "gpu=80GiB,gpus=8", *ON_GPUS)
    assert (len(gpus_of(made.learner)), len(made.generators)) == (2, 6)
    assert made.problems == ()


def test_an_engine_that_does_not_fit_one_gpu_gets_more(models):
    made = split(models["8B"], "gpu=24GiB,gpus=8", *ON_GPUS, "learner.ranks=2")
    assert int(setting(made.generators[0], "generator.tensor_parallel_size")) > 1


def test_what_the_user_wrote_stands(models):
    settings = ["learner.ranks=3", "generator.tensor_parallel_size=2"]
    made = split(models["0.5B"], "gpu=80GiB,gpus=8", *ON_GPUS, *settings)
    assert gpus_of(made.learner) == ["0", "1", "2"]
    assert [gpus_of(place) for place in made.generators] == [["3", "4"], ["5", "6"]]
    assert "GPU 7 idle" in made.line
    made = split(models["0.5B"], "gpu=80GiB,gpus=8", *ON_GPUS, count=4)
    assert (len(gpus_of(made.learner)), len(made.generators)) == (4, 4)


@pytest.mark.parametrize(
    ("settings", "count"), [(["learner.ranks=8"], None), (["generator.tensor_parallel_size=8"], None), ([], 9)]
)
def test_more_than_there_is_is_refused(models, settings, count):
    with pytest.raises(ConfigError, match=r"8 GPUs do not hold .* lower learner.ranks"):
        split(models["0.5B"], "gpu=80GiB,gpus=8", *ON_GPUS, *settings, count=count)


def test_one_gpu_is_shared_and_the_engine_gets_what_the_learner_leaves(models):
    made = split(models["0.5B"], "gpu=80GiB,gpus=1", *ON_GPUS, "learner.micro_batch_tokens=2048")
    assert gpus_of(made.learner) == gpus_of(made.generators[0]) == ["0"]
    fraction = float(setting(made.generators[0], "generator.gpu_memory_fraction"))
    needed = float(re.search(r"needs ([\d.]+) GiB", made.line)[1])
    assert 0.3 < fraction < 1 - needed / 80
    assert made.problems == ()
    asked = split(models["0.5B"], "gpu=80GiB,gpus=1", *ON_GPUS, "generator.gpu_memory_fraction=0.25")
    assert setting(asked.generators[0], "generator.gpu_memory_fraction") is None
    assert "25 %" in asked.line
    with pytest.raises(ConfigError, match="leaves no room for an engine"):
        split(models["8B"], "gpu=80GiB,gpus=1", *ON_GPUS)
    with pytest.raises(ConfigError, match="--generators 2 on one GPU"):
        split(models["0.5B"], "gpu=80GiB,gpus=1", *ON_GPUS, count=2)


def test_what_does_not_fit_is_said_with_what_helps(models):
    made = split(models["8B"], "gpu=24GiB,gpus=2", *ON_GPUS)
    assert any("the learner needs" in problem and "learner.ranks" in problem for problem in made.problems)
    assert any("an engine needs" in problem for problem in made.problems)
    made = split(models["0.5B"], "gpu=80GiB,gpus=2,host=1GiB", *ON_GPUS)
    assert any("host memory" in problem for problem in made.problems)


def test_one_side_on_gpus_and_the_other_on_cores(models):
    made = split(models["0.5B"], "gpu=80GiB,gpus=2", *ON_GPUS[:1], "learner.device=cpu", "generator.device=cuda")
    assert made.learner.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert [gpus_of(place) for place in made.generators] == [["0"], ["1"]]
    made = split(models["0.5B"], "gpu=80GiB,gpus=2", *ON_GPUS[:1], "learner.device=cuda", "generator.device=cpu")
    assert gpus_of(made.learner) == ["0", "1"]
    assert made.generators[0].environment["CUDA_VISIBLE_DEVICES"] == ""


def test_the_gpus_are_those_that_the_environment_allows():
    assert visible_gpus(3, {}) == ("0", "1", "2")
    assert visible_gpus(8, {"CUDA_VISIBLE_DEVICES": "4, GPU-8f1e,7"}) == ("4", "GPU-8f1e", "7")
    assert visible_gpus(8, {"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert visible_gpus(8, {"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_a_gpu_that_the_environment_hides_is_not_used(models):
    config = load_config(None, [f"model.path={models['0.5B']}", "task.path=a:B", "learner.device=cuda"])
    host = DividedHost(parse_hardware("gpu=80GiB,gpus=1"), 8, ())
    with pytest.raises(ConfigError, match="no GPU is to be used here"):
        split_host(config, {"learner.device"}, find_model(config.model.path), host)


SHIPPED = {  # file → the model's size, GPUs of the host, ranks and generators that it comes to
    "gsm8k_qwen_gpu": ("0.5B", 1, 1, 1),
    "gsm8k_qwen_4b": ("4B", 2, 1, 1),
    "gsm8k_qwen_8b_lora": ("8B", 2, 1, 1),
    "gsm8k_qwen_8b": ("8B", 8, 4, 4),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configurations_come_to_the_split_that_they_name(models, name):
    size, gpus, ranks, generators = SHIPPED[name]
    path = ROOT / "configs" / f"{name}.yaml"
    made = split(models[size], f"gpu=80GiB,gpus={gpus},host=512GiB", config_file=path)
    assert (len(gpus_of(made.learner)), len(made.generators)) == (ranks, generators)
    assert "NOT YET RUN ON A GPU" in path.read_text()


@pytest.mark.skipif(not hasattr(forecast, "head_bytes"), reason="the forecast knows one rank alone")
@pytest.mark.parametrize("name", [*SHIPPED, "gsm8k_qwen_8b_2nodes"])
def test_the_shipped_configurations_fit_gpus_of_80_gb_by_their_forecast(models, name):
    size, gpus, *_ = SHIPPED.get(name, ("8B", 9))  # of the two nodes: the learner's eight and one of the other
    made = split(models[size], f"gpu=80GB,gpus={gpus},host=512GiB", config_file=ROOT / "configs" / f"{name}.yaml")
    assert made.problems == ()


# -- cores


def test_all_cores_are_for_everybody_and_nothing_is_pinned(models):
    made = split(models["0.5B"], "gpus=0", cores=4)
    assert setting(made.learner, "learner.threads") == "4"
    assert not any("cpus" in text for place in (made.learner, *made.generators) for text in place.settings)
    assert "nothing is pinned" in made.line
    made = split(models["0.5B"], "gpus=0", cores=4, count=2)
    assert len(made.generators) == 2
    assert setting(made.generators[0], "generator.threads") == "2"
    assert setting(split(models["0.5B"], "gpus=0", cores=192).learner, "learner.threads") == "16"


def test_passes_of_a_learner_on_cores_are_short_unless_the_user_wrote_otherwise(models):
    assert setting(split(models["0.5B"], "gpus=0").learner, "learner.micro_batch_tokens") == "2048"
    made = split(models["0.5B"], "gpus=0", "model.max_length=3000")
    assert setting(made.learner, "learner.micro_batch_tokens") == "3000", "one sequence must fit"
    made = split(models["0.5B"], "gpus=0", "learner.micro_batch_tokens=8192")
    assert setting(made.learner, "learner.micro_batch_tokens") is None
    on_gpu = split(models["0.5B"], "gpu=80GiB,gpus=2", *ON_GPUS)
    assert setting(on_gpu.learner, "learner.micro_batch_tokens") is None


def test_more_sequences_are_decoded_at_once_on_cores_where_they_can_be(models):
    def sequences(*settings, count=None):
        made = split(models["0.5B"], "gpus=0", "model.max_length=512", *settings, count=count)
        return setting(made.generators[0], "generator.max_sequences")

    roomy = ("generator.kv_cache_gib=4", "learner.groups_per_step=8", "sampling.group_size=8")
    assert sequences(*roomy) == "128"
    assert sequences(*roomy, "sampling.group_size=12") == "120", "whole groups"
    assert sequences(*roomy, "generator.max_sequences=32") is None, "the user's word"
    assert sequences(*roomy, "staleness.max_age=0") is None, "64 are under way, as by default"
    assert sequences(*roomy, "staleness.max_age=2") == "128"
    assert sequences(*roomy, "staleness.max_age=2", count=2) == "96"
    narrow = ("model.dtype=bfloat16", "generator.kv_cache_gib=0.5")
    assert sequences(*roomy, *narrow) == "80", "12 KiB a token"


def test_threads_and_cores_that_the_user_wrote_stand(models):
    made = split(models["0.5B"], "gpus=0", "learner.cpus=[0]", "generator.threads=3")
    assert setting(made.learner, "learner.threads") is None and made.generators[0].settings == ()
    assert "the learner has 1 thread, 1 generator 3 threads; pinned by learner.cpus=[0]" in made.line


def test_a_value_of_the_file_counts_as_written(models, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learner: {threads: 3}\n")
    made = split(models["0.5B"], "gpus=0", config_file=path)
    assert setting(made.learner, "learner.threads") is None
    assert "the learner has 3 threads" in made.line


# -- the command


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{path: {make_model_folder(tmp_path / 'model')}}}\n"
        "task: {path: 'asyncrl.tasks.arithmetic:Arithmetic'}\n"
    )
    return str(path)


def test_a_dry_run_prints_the_split_and_starts_nothing(config, capsys, tmp_path):
    arguments = ["run", config, "--dry-run", "--for", "gpu=80GiB,gpus=4,host=64GiB"]
    assert command.main(arguments) == 0
    out = capsys.readouterr()
    assert "4 GPUs: 1 rank of the learner on GPU 0, 3 generators" in out.err
    assert out.out == "fits the hardware that --for names\n"
    assert not (tmp_path / "runs").exists()
    assert command.main([*arguments[:-1], "gpus=0,host=1GiB"]) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a command"),
        (["run"], "give a configuration file"),
        (["run", "run.steps=3"], "give a configuration file"),
        (["run", "CONFIG", "--generators", "0"], "give 1 or more"),
        (["run", "CONFIG", "lr=1"], "unknown key lr"),
        (["run", "CONFIG", "--for", "gpus=1"], "give both, or neither"),
        (["run", "nowhere.yaml"], "there is no such configuration file"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence_and_exit_code_2(config, capsys, arguments, words):
    assert command.main([config if argument == "CONFIG" else argument for argument in arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["sprint"], ["run", "--sprint"]])
def test_unknown_words_name_the_help(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "--help" in capsys.readouterr().err

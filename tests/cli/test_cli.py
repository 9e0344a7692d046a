"""The two commands as a user meets them: help, dry run, exit codes, messages."""

import json
import os
import resource
import socket
import subprocess
import sys

import pytest

from asyncrl import errors
from asyncrl.cli import dry_run, forecast, generator, learner
from asyncrl.cli.common import EXIT_CODES, command, help_text
from asyncrl.cli.forecast import generator_needs, kv_cache, learner_needs
from asyncrl.config.checks import largest_group_bytes
from asyncrl.config.keys import keys
from asyncrl.config.loading import load_config
from asyncrl.host.model_folder import find_model
from tests.model_folders import make_model_folder

ROLES = ["learner", "generator"]
MAINS = {"learner": learner.main, "generator": generator.main}
HEAVY = ("torch", "vllm", "zmq", "transformers", "omegaconf", "numpy", "wandb", "matplotlib", "rich")


def run(role, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", f"asyncrl.cli.{role}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )


@pytest.fixture
def here(capsys):
    """Runs a command in this process, which need not be imported again; its code, and what it printed."""

    def run_here(role, *arguments):
        try:
            code = MAINS[role](list(map(str, arguments)))
        except SystemExit as end:  # as argparse ends
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_here


def cpu_seconds_of_children():
    """Of those that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture
def model_folder(tmp_path):
    return make_model_folder(tmp_path / "model")


@pytest.fixture
def config_file(tmp_path, model_folder):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {model_folder}}}\nrun: {{dir: {tmp_path}/run}}\n")
    return path


# -- help


@pytest.mark.parametrize("role", ROLES)
def test_help_imports_nothing_heavy(role):
    script = (
        f"import sys; from asyncrl.cli.{role} import main; code = main(['--help']); "
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_importing_the_package_imports_nothing_else():
    script = "import sys; before = set(sys.modules); import asyncrl; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["asyncrl"]


def test_a_start_imports_no_torch_before_the_daemon_does(config_file):
    script = (
        "import sys; from asyncrl.cli.common import command; "
        "start = lambda config: int('torch' in sys.modules or 'zmq' in sys.modules); "
        f"sys.exit(command('learner', [{str(config_file)!r}], start))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_help_costs_less_than_a_second_of_cpu_time():
    """Importing torch alone would cost seconds. Of the CPU, because others may use the machine; the best of three."""
    seconds = []
    for _ in range(3):
        before = cpu_seconds_of_children()
        assert run("learner", "--help").returncode == 0
        seconds.append(cpu_seconds_of_children() - before)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("role", ROLES)
def test_help_lists_every_key_with_sentence_and_default_and_every_exit_code(role):
    text = help_text(role, columns=100)
    flowing = " ".join(text.split())
    for key in keys():
        default = "" if key.shown_default == "empty" else key.shown_default
        assert f"  {key.name}={default}\n" in text
        assert key.sentence in flowing
    for code, meaning in EXIT_CODES.items():
        assert f" {code} " in flowing and meaning in flowing


@pytest.mark.parametrize("columns", [10, 60, 80, 300])
def test_help_is_wrapped_to_the_terminal(columns):
    longest = max(help_text("learner", columns).splitlines(), key=len)
    assert len(longest) <= max(80, min(columns, 110)), longest


def test_help_survives_a_reader_who_left():
    reader, writer = os.pipe()
    os.close(reader)
    command_line = [sys.executable, "-m", "asyncrl.cli.learner", "--help"]
    done = subprocess.run(command_line, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_exit_code_of_an_error_is_documented():
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert codes <= set(EXIT_CODES)
    assert codes == {2, 3, 4, 5, 6, 7, 8, 9}


def test_version_is_printed():
    done = run("generator", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "asyncrl-generator")


# -- user errors: exit code 2, one message on stderr, no traceback


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learner.lrr=1"], "the nearest is learner.lr"),
        (["run.steps=0"], "run.steps=0 (command line): must be at least 1"),
        (["model.path=/none"], "model.path=/none: there is no such folder; bin/warmup"),
        (["sampling.group_size=1"], "a group of one teaches nothing"),
        (["--dry"], "unrecognized arguments: --dry"),
        (["steps"], "'steps' (command line) is not key=value"),
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_a_user_error_is_a_message_and_exit_code_2(role, config_file, here, arguments, words):
    code, out, errors = here(role, config_file, *arguments)
    assert (code, out) == (2, "")
    assert words in errors
    assert errors.startswith(f"asyncrl-{role}: ")


@pytest.mark.parametrize("role", ROLES)
def test_a_user_error_of_a_process_is_no_traceback(role, config_file):
    done = run(role, config_file, "run.steps=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"asyncrl-{role}: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["run.steps=3"]])
def test_a_forgotten_configuration_file_is_asked_for(here, arguments):
    code, _, errors = here("learner", *arguments)
    assert code == 2
    assert "give a configuration file, for example: asyncrl-learner configs/quickstart.yaml" in errors


# -- from exceptions to exit codes


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")],
    ids=lambda kind: kind.__name__,
)
def test_an_error_of_a_daemon_becomes_its_exit_code(kind, config_file, capsys):
    def start(config):
        raise kind("what happened\nwhat to do")

    assert command("learner", [str(config_file)], start) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.err == "asyncrl-learner: what happened\nasyncrl-learner: what to do\n"


@pytest.mark.parametrize("kind", [errors.ShapeError, KeyError])
def test_a_defect_keeps_its_traceback(kind, config_file):
    def start(config):
        raise kind("a defect")

    with pytest.raises(kind):
        command("learner", [str(config_file)], start)


def test_the_daemon_gets_the_checked_configuration_and_its_code_is_returned(config_file):
    seen = []

    def start(config):
        seen.append(config)
        return 5

    assert command("generator", [str(config_file), "run.steps=7"], start) == 5
    assert seen[0].run.steps == 7


def test_a_hub_name_reaches_the_daemon_as_a_folder(config_file, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    for folder in (snapshot.parent, snapshot.parents[1] / "refs"):
        folder.mkdir(parents=True)
    model_folder.rename(snapshot)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    seen = []

    def start(config):
        seen.append(config.model.path)
        return 0

    assert command("learner", [str(config_file), "model.path=org/tiny"], start) == 0
    assert seen == [str(snapshot)]


def test_flags_may_stand_anywhere(config_file, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "_task", lambda config, *rest: [("path", config.task.path)])
    for arguments in (["--dry-run", config_file, "run.steps=7"], [config_file, "--dry-run", "run.steps=7"]):
        assert command("learner", list(map(str, arguments)), start=None) == 0
        assert "steps: 7" in capsys.readouterr().out


# -- dry run


@pytest.mark.parametrize("role", ROLES)
def test_dry_run_prints_the_resolved_configuration_starts_nothing_writes_nothing_and_exits_0(
    role, config_file, tmp_path
):
    before = sorted(tmp_path.rglob("*"))
    done = run(role, config_file, "--dry-run", "run.name=blue", "run.dir=runs/${run.name}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "dir: runs/blue" in done.stdout
    assert "536, computed in float32" in done.stdout
    assert "model.safetensors" in done.stdout
    assert "runs/blue/rollouts.sock, for its user only" in done.stdout


def test_dry_run_says_when_the_port_is_taken(config_file, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "_task", lambda config, *rest: [("path", config.task.path)])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"transport.address=tcp://127.0.0.1:{taken.getsockname()[1]}"
        command("learner", [str(config_file), "--dry-run", address], start=None)
        assert "NOT available now (Address already in use)" in capsys.readouterr().out
    command("learner", [str(config_file), "--dry-run", address], start=None)
    assert "free now" in capsys.readouterr().out


def held(needs, *names):
    """Bytes of the needs whose names begin so."""
    return sum(need.num_bytes for need in needs if need.name.startswith(names))


def test_learner_memory_follows_the_documented_formula(config_file, model_folder):
    model = find_model(str(model_folder))
    config = load_config(config_file, ["model.dtype=bfloat16", "algorithm.kl_coef=0.1", "staleness.max_age=2"])
    needs = learner_needs(config, model, on_gpu=False)
    whole = ("master", "gradients", "Adam", "snapshot", "compute", "reference")
    assert held(needs, *whole) == 536 * (4 + 4 + 8 + 3 * 2 + 2 + 4)
    assert held(needs, "copies of a checkpoint") == 536 * 12
    assert held(needs, "replay") == 3 * config.learner.groups_per_step * largest_group_bytes(config)
    plain = learner_needs(load_config(config_file, ["staleness.max_age=2"]), model, on_gpu=False)
    assert held(plain, *whole) == 536 * (4 + 4 + 8 + 2 * 4)
    ranks = ["staleness.max_age=2", "model.dtype=bfloat16", "algorithm.kl_coef=0.1", "learner.ranks=4"]
    host, gpu = (learner_needs(load_config(config_file, ranks), model, on_gpu=on_gpu) for on_gpu in (False, True))
    sharded = ("master", "gradients", "Adam", "snapshot", "reference")
    assert held(host, *sharded) == 536 * (4 + 4 + 8 + 3 * 2 + 2), "slices of one model, the reference as it computes"
    assert held(gpu, *sharded) == 536 // 4 * (4 + 4 + 8 + 3 * 2 + 2), "of which each GPU has a quarter"
    assert held(host, "activations") == 4 * held(gpu, "activations")
    copies = load_config(config_file, [*ranks, "learner.replicas=2"])
    host, gpu_of_two = (learner_needs(copies, model, on_gpu=on_gpu) for on_gpu in (False, True))
    assert held(host, *sharded) == 536 * (2 * (4 + 4 + 8 + 2) + 3 * 2), "two copies, which are sent and saved once"
    assert held(gpu_of_two, *sharded) == 536 // 2 * (4 + 4 + 8 + 2) + 536 // 4 * 3 * 2
    assert held(host, "copies of a checkpoint") == 536 * 12
    shared = load_config(config_file, [*ranks, "learner.sequence_parallel=2"])
    assert 2 * held(learner_needs(shared, model, on_gpu=True), "activations") == held(gpu, "activations")


def test_generator_memory_counts_weights_staging_cache_and_outbox(config_file, model_folder):
    config = load_config(config_file, ["generator.kv_cache_gib=0.5", "generator.device=cpu"])
    model = find_model(str(model_folder))
    needs = generator_needs(config, model, on_gpu=False)
    assert held(needs, "weights", "staging") == 2 * 4 * 536
    assert held(needs, "KV cache", "outbox") == 2**29 + config.generator.outbox_bytes
    # 2 layers x 2 heads x head_dim 2 x (key + value) x 4 bytes = 64 bytes a token
    assert kv_cache(config, model, needs, None, on_gpu=False) == 2**29 // 64 // 1024


def test_tensor_parallel_workers_stage_slices_and_the_first_version_whole_on_the_host(config_file, model_folder):
    model, spread = find_model(str(model_folder)), ["generator.tensor_parallel_size=2", "weights.bucket_bytes=1024"]
    config = load_config(config_file, spread)
    on_gpu = [need for need in generator_needs(config, model, on_gpu=True) if need.place == "GPU"]
    assert held(on_gpu, "weights", "staging") == 2 * 4 * 536 // 2 + 3 * 1024
    needs = generator_needs(config, model, on_gpu=False)
    assert held(needs, "staging") == 4 * 536 + 2 * 3 * 1024 and held(needs, "the first version") == 2 * 4 * 536


def test_what_does_not_travel_is_kept_by_the_generator_too(config_file, model_folder):
    model = find_model(str(model_folder))
    config = load_config(config_file, ["update.what=partial", "update.names=[norm]"])
    needs = generator_needs(config, model, on_gpu=False)
    assert held(needs, "staging", "what does not travel") == model.num_bytes and held(needs, "staging") == 4 * 8


def test_parameters_of_a_sharded_model_are_summed(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "a.safetensors")
    (model_folder / "b.safetensors").write_bytes((model_folder / "a.safetensors").read_bytes())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_model(str(model_folder)).num_parameters() == 2 * 536


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_damaged_weight_file_is_a_model_error(config_file, model_folder, here, content):
    (model_folder / "model.safetensors").write_bytes(content)
    code, _, errors = here("learner", config_file, "--dry-run")
    assert code == 2
    assert "is not a safetensors file; copy the model again" in errors


def test_name_lookups_are_short_unless_the_user_says_how_long(monkeypatch, capsys):
    monkeypatch.delenv("RES_OPTIONS")
    assert command("learner", ["--version"], None) == 0
    assert os.environ["RES_OPTIONS"] == "timeout:1 attempts:3"
    monkeypatch.setenv("RES_OPTIONS", "timeout:9")
    assert command("generator", ["--version"], None) == 0
    assert os.environ["RES_OPTIONS"] == "timeout:9"


def test_the_forecast_takes_the_chunks_of_logits_that_the_head_takes():
    from asyncrl.algorithms import logprobs

    assert (forecast.HEAD_CHUNK_BYTES, forecast.MIN_CHUNK_ROWS) == (logprobs.CHUNK_BYTES, logprobs.MIN_CHUNK_ROWS)

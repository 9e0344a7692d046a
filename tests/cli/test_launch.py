"""The files for clusters: they pass their linters, and what they start is what the real commands accept.

The commands in them are run, with daemons in their place that make all checks of a start, print what they were given,
and end.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from asyncrl.cli import main as command
from asyncrl.cli.launch.cluster import cluster_run, filled
from tests.model_folders import make_model_folder

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ON_CPU = ["learner.device=cpu", "generator.device=cpu"]
CHECKS = """
import sys
from asyncrl.cli.common import exit_code_of
from asyncrl.cli.run import checked
from asyncrl.config.loading import load_config, to_yaml
def start():
    config = load_config(sys.argv[1], sys.argv[2:])
    checked(config, "ROLE")
    print(to_yaml(config) + "fits")
    return 0
sys.exit(exit_code_of("ROLE", start))
"""
NODE_CHECKS = """
import sys
from asyncrl.cli import trainer_node
def told(config, layout, file):
    print(f"node {layout.first // layout.count} meets {layout.host}:{layout.port}", flush=True)
    return 0
trainer_node._supervise = told
sys.exit(trainer_node.main())
"""
# As srun does with one task on one node, here.
SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
COMMANDS = Path(sys.executable).parent


def printed(capsys, *arguments):
    assert command.main(["launch", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def run_shell(script, *arguments, folder, **environment):
    done = subprocess.run(
        ["bash", "-s", "--", *arguments],
        input=script,
        cwd=folder,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{COMMANDS}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def check_shell(script, folder):
    """bash's own check, and shellcheck's where it is installed."""
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def config(tmp_path):
    """A configuration with a model, in a folder whose name has a space; commands that stand for the daemons."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    make_model_folder(tmp_path / "model")
    path = folder / "run.yaml"
    path.write_text(
        f"run: {{name: 7_Blue.run, dir: '{folder / 'out'}'}}\n"
        f"model: {{path: '{tmp_path / 'model'}'}}\n"
        "task: {path: 'asyncrl.tasks.arithmetic:Arithmetic'}\n"
        "learner: {device: cpu, threads: 3}\ngenerator: {device: cpu}\n"
    )
    (folder / "bin").mkdir()
    for role in ("learner", "generator"):
        wrapper = folder / "bin" / f"asyncrl-{role}"
        wrapper.write_text(f"#!{sys.executable}\n{CHECKS}".replace("ROLE", role))
        wrapper.chmod(0o700)
    for name, text in (("asyncrl-trainer-node", f"#!{sys.executable}\n{NODE_CHECKS}"), ("srun", SRUN)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o700)
    return path


# -- Slurm


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_slurm_script_of_every_shipped_configuration_passes_the_linters(path, capsys, tmp_path):
    script = printed(capsys, "slurm", path)
    check_shell(script, tmp_path)
    for job in ("learner", "generators"):
        code, text, _ = run_shell(script, "print", job, folder=tmp_path)
        assert code == 0 and text.startswith("#!") and "@" not in re.sub(r"%j|\$@|\[@\]|B:TERM@\d+", "", text)
        check_shell(text, tmp_path)
        if shutil.which("sbatch"):
            done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr


def use_fake_sbatch(folder):
    """A cluster of one machine: a job that is submitted runs at once, generators as the members of their array."""
    sbatch = folder / "bin" / "sbatch"
    sbatch.write_text(
        "#!/usr/bin/env bash\nset -eu\n"
        # A job sets PATH itself: what stands for the daemons is in front here.
        f"sed 's|^export PATH=.*|export PATH=\"{folder}/bin:$PATH\"|' >job\n"
        "if [[ ${1:-} == --array=* ]]; then export SLURM_ARRAY_TASK_ID=${1#--array=}; fi\n"
        "exec bash job\n"
    )
    sbatch.chmod(stat.S_IRWXU)


def test_the_slurm_jobs_start_daemons_that_accept_what_they_are_given(config, capsys):
    folder = config.parent
    use_fake_sbatch(folder)
    script = printed(capsys, "slurm", config, "run.steps=7", "learner.lr=2e-5")
    script = re.sub(r"(?m)^export PATH=.*$", 'export PATH="bin:$PATH"', script, count=1)
    code, out, errors = run_shell(script, "learner", folder=folder)
    assert code == 0, errors
    address = (folder / "out" / "address").read_text()
    assert re.fullmatch(r"tcp://\d+\.\d+\.\d+\.\d+:5770\n", address)
    assert "steps: 7" in out and "lr: 2.0e-05" in out and address.strip() in out and out.endswith("fits\n")
    code, out, errors = run_shell(script, "generators", "3", folder=folder)
    assert code == 0, errors
    assert "id: run-7-blue-run-generator-3" in out and out.endswith("fits\n")
    allowed = (folder / "out" / "keys" / "allowed_keys").read_text()
    assert "run-7-blue-run-generator-3" in allowed
    code, out, errors = run_shell(script, "generators", "some", folder=folder)
    assert (code, out) == (2, "") and "for example: generators 0-3" in errors


def test_a_learner_job_hands_a_signal_on_and_waits_for_the_checkpoint(config, capsys, tmp_path):
    """The learner here is a process that takes its time after SIGTERM, and ends with a code of its own."""
    folder = config.parent
    (folder / "out").mkdir()
    script = printed(capsys, "slurm", config)
    _, job, _ = run_shell(script, "print", "learner", folder=folder)
    slow = (
        f"{sys.executable} -c 'import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(6)))\n"
        f'open("{folder}/up", "w").close()\ntime.sleep(60)\' &'
    )
    job = re.sub(r"(?m)^asyncrl-learner .*&$", lambda _: slow, job)
    with subprocess.Popen(["bash", "-c", job], cwd=folder) as process:
        from tests.waits import wait_until

        wait_until((folder / "up").exists, "the learner to be up")
        process.terminate()
        assert process.wait(20) == 6


def test_a_slurm_job_of_several_nodes_starts_the_ranks_of_the_others(config, capsys):
    script = printed(capsys, "slurm", config, "learner.nodes=3", "learner.ranks=2", "learner.device=cuda")
    _, job, _ = run_shell(script, "print", "learner", folder=config.parent)
    assert "#SBATCH --nodes=3" in job and "#SBATCH --gpus-per-node=2" in job
    check_shell(job, config.parent)
    use_fake_sbatch(config.parent)
    script = printed(capsys, "slurm", config, "learner.nodes=3", "learner.ranks=2")
    script = re.sub(r"(?m)^export PATH=.*$", 'export PATH="bin:$PATH"', script, count=1)
    code, out, errors = run_shell(script, "learner", folder=config.parent)
    assert code == 0, errors
    assert set(re.findall(r"(node \d) meets ", out)) == {"node 1", "node 2"}, out + errors
    assert out.count(":29500\n") == 2


# -- Kubernetes

TEXT, NUMBER, FLAG = str, int, bool
METADATA = {"name": TEXT}
LABELS = {"*": TEXT}
PROBE = {
    "httpGet!": {"path!": TEXT, "port!": TEXT},
    **dict.fromkeys(("periodSeconds", "failureThreshold", "timeoutSeconds"), NUMBER),
}
VOLUME = {
    "name!": TEXT,
    "configMap": {"name!": TEXT},
    "secret": {"secretName!": TEXT, "defaultMode": NUMBER},
    "persistentVolumeClaim": {"claimName!": TEXT, "readOnly": FLAG},
    "emptyDir": {"medium": TEXT, "sizeLimit": TEXT},
}
POD = {
    "metadata!": {"labels!": LABELS, "annotations": LABELS},
    "spec!": {
        "subdomain": TEXT,
        "restartPolicy": TEXT,
        "terminationGracePeriodSeconds": NUMBER,
        "volumes": [VOLUME],
        "containers!": [
            {
                "name!": TEXT,
                "image!": TEXT,
                "workingDir": TEXT,
                "command": [TEXT],
                "args": [TEXT],
                "env": [{"name!": TEXT, "valueFrom!": {"fieldRef!": {"fieldPath!": TEXT}}}],
                "ports": [{"name": TEXT, "containerPort!": NUMBER}],
                "startupProbe": PROBE,
                "livenessProbe": PROBE,
                "resources": {"requests": LABELS, "limits": LABELS},
                "volumeMounts": [{"name!": TEXT, "mountPath!": TEXT, "readOnly": FLAG}],
            }
        ],
    },
}
# Field → what it holds, as the API has it; "!" marks what must be there, "*" any name.
SPECS = {
    ("v1", "ConfigMap"): {"data!": LABELS},
    ("v1", "PersistentVolumeClaim"): {"spec!": {"accessModes!": [TEXT], "resources!": {"requests!": LABELS}}},
    ("v1", "Service"): {
        "spec!": {
            "clusterIP": TEXT,
            "publishNotReadyAddresses": FLAG,
            "selector!": LABELS,
            "ports!": [{"name!": TEXT, "port!": NUMBER}],
        }
    },
    ("batch/v1", "Job"): {
        "spec!": {
            "completionMode": TEXT,
            **dict.fromkeys(("completions", "parallelism", "backoffLimit"), NUMBER),
            "template!": POD,
        }
    },
    ("apps/v1", "StatefulSet"): {
        "spec!": {
            "serviceName!": TEXT,
            "replicas": NUMBER,
            "podManagementPolicy": TEXT,
            "selector!": {"matchLabels!": LABELS},
            "template!": POD,
        }
    },
}


def misfits(value, shape, at=""):
    """Where a manifest is not of the shape that the API wants."""
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{at}: no list"]
        return [problem for place, entry in enumerate(value) for problem in misfits(entry, shape[0], f"{at}[{place}]")]
    if not isinstance(shape, dict):
        return [] if type(value) is shape else [f"{at}: {value!r} is no {shape.__name__}"]
    if not isinstance(value, dict):
        return [f"{at}: no mapping"]
    known = {name.rstrip("!"): inner for name, inner in shape.items()}
    problems = [f"{at}.{name[:-1]}: missing" for name in shape if name.endswith("!") and name[:-1] not in value]
    for name, inner in value.items():
        if name not in known and "*" not in known:
            problems.append(f"{at}.{name}: unknown")
        else:
            problems += misfits(inner, known.get(name, known.get("*")), f"{at}.{name}")
    return problems


def check_manifests(text):
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        shape = {"apiVersion!": TEXT, "kind!": TEXT, "metadata!": {"name!": TEXT}}
        shape |= SPECS[document["apiVersion"], document["kind"]]
        assert misfits(document, shape) == []
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
        if importlib.util.find_spec("kubernetes_validate"):
            import kubernetes_validate

            kubernetes_validate.validate(document, "1.34", strict=True)
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_manifests_of_every_shipped_configuration_fit_the_api(path, nodes, capsys):
    kinds = check_manifests(printed(capsys, "kubernetes", path, f"learner.nodes={nodes}"))
    assert set(kinds) == {"ConfigMap", "PersistentVolumeClaim", "Service", "Job", "StatefulSet"}
    assert kinds["ConfigMap"]["data"]["run.yaml"].strip() == "\n".join(map(str.rstrip, path.read_text().splitlines()))
    assert kinds["Job"]["spec"]["completions"] == kinds["Job"]["spec"]["parallelism"] == nodes
    for kind in ("Job", "StatefulSet"):
        pod = kinds[kind]["spec"]["template"]
        assert kinds["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
        check_shell(f"#!/bin/sh\n{container['args'][0]}", None)


def test_a_manifest_that_does_not_fit_is_seen():
    shape = SPECS["v1", "Service"]
    assert misfits({"spec": {"selector": {}, "ports": [{"name": "a", "port": 1}]}}, shape) == []
    assert misfits({"spec": {"selectors": {}, "ports": [{"name": "a", "port": "1"}]}}, shape) == [
        ".spec.selector: missing",
        ".spec.selectors: unknown",
        ".spec.ports[0].port: '1' is no int",
    ]


LEARNER = "run-7-blue-run-learner-0.run-7-blue-run"  # a name that only a cluster knows
POD = "run-7-blue-run-generator-1"


def run_pod(manifest, folder, index):
    """Runs the command of a pod, with folders here in the place of those inside of it."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].replace(LEARNER, "10.1.2.9")
    places = {"config": folder / "config", "keys": folder / "keys", "models": folder.parent, "runs": folder / "runs"}
    for inside, outside in places.items():
        script = re.sub(rf"(?<=[= ])/{inside}/", f"{outside}/", script)
    pod = {"POD_IP": "10.1.2.3", "POD_NAME": POD, "JOB_COMPLETION_INDEX": str(index)}
    code, out, errors = run_shell(script, folder=folder, **pod)
    assert code == 0, errors
    return out


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_commands_of_the_pods_are_what_the_daemons_accept(config, capsys, nodes):
    folder = config.parent.rename(config.parent.with_name("runs"))  # inside of a pod no folder has a space
    settings = [f"learner.nodes={nodes}", "run.steps=7", "--generators", "2", "--image", "me:1"]
    kinds = check_manifests(printed(capsys, "kubernetes", folder / config.name, *settings))
    command = [sys.executable, "-m", "asyncrl.link.key_commands", "make", folder / "keys", POD]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "config").mkdir()
    (folder / "config" / "run.yaml").write_text(kinds["ConfigMap"]["data"]["run.yaml"])
    for kind, address in (("Job", "tcp://10.1.2.3:5770"), ("StatefulSet", "tcp://10.1.2.9:5770")):
        assert kinds[kind]["spec"]["template"]["spec"]["containers"][0]["image"] == "me:1"
        out = run_pod(kinds[kind], folder, 0)
        assert f"address: {address}" in out
        assert "http: 10.1.2.3:9100" in out and "steps: 7" in out and out.endswith("fits\n")
    assert kinds["StatefulSet"]["spec"]["replicas"] == 2
    if nodes == 2:
        assert run_pod(kinds["Job"], folder, 1) == "node 1 meets 10.1.2.9:29500\n"


# -- what both are made of


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("transport.address=tcp://127.0.0.1:5770", "cannot be reached from other hosts"),
        ("transport.address=tcp://10.0.0.1:1,tcp://10.0.0.2:1", "names several places"),
        ("transport.address=10.0.0.1", "must be tcp://HOST:PORT"),
        ("weights.host=127.0.0.1", "cannot be reached from other hosts"),
        ("weights.backend=ipc", "shares memory of one machine"),
        ("generator.http=off", "the file sets it"),
    ],
)
@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_an_address_that_cannot_work_between_hosts_is_refused(config, capsys, cluster, setting, words):
    assert command.main(["launch", cluster, str(config), setting]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and setting.partition("=")[0] in shown.err


def test_sizes_and_ports_are_those_of_the_configuration(config):
    run = cluster_run(str(config), ["transport.address=tcp://10.0.0.1:6000", "learner.ranks=2"], None)
    assert (run.rollout_port, run.learner.gpus, run.generator.gpus) == (6000, 0, 0)
    assert run.learner.cores == 2 * 3 + 2
    assert 0 < run.learner.memory_gib < 16 and 0 < run.disk_gib < 100 and run.notes == ()
    on_gpus = ["learner.device=cuda", "learner.ranks=4", "generator.device=cuda", "generator.tensor_parallel_size=2"]
    run = cluster_run(str(config), on_gpus, 6)
    assert (run.learner.gpus, run.generator.gpus, run.generators) == (4, 2, 6)
    run = cluster_run(str(config), ["model.path=Some/Model"], None)
    assert "the model is not on this host" in run.notes[0]


def test_a_value_that_looks_like_a_place_in_a_template_stays_as_it_is():
    assert filled("@A@ @B@ @C@", {"A": "@B@", "B": "x"}) == "@B@ x @C@"


@pytest.mark.parametrize("arguments", [["launch"], ["launch", "nomad", "c.yaml"]])
def test_an_unknown_cluster_names_the_help(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "--help" in capsys.readouterr().err

"""What the files for a cluster are made of: sizes, ports and names, derived from one configuration and checked.

Addresses are found where the learner runs, by the files themselves. One that the configuration names is refused where
it could not work between hosts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncrl.cli.forecast import DISK, GPU, HOST, Need, generator_needs, learner_needs
from asyncrl.config import Config
from asyncrl.config.checks import raise_all
from asyncrl.config.host_checks import is_on_gpu
from asyncrl.config.loading import load_config, written_values
from asyncrl.errors import ModelError
from asyncrl.host.addresses import AUTO, FILE, is_loopback, rollout_address
from asyncrl.host.model_folder import find_model

ROLLOUT_PORT = 5770
RENDEZVOUS_PORT = 29500  # of torch
HTTP_PORT = 9100
DEFAULT_GENERATORS = 4
SPARE = 1.25  # of memory: what the forecast does not know
SPARE_CORES = 2  # of the desk, of vLLM's front end, of rewards
GIB = 2**30
# Stands for the learner's address while the configuration is checked; the files find the real one.
STANDS_FOR = "10.255.255.254"
FOUND_THERE = (
    f"weights.host={STANDS_FOR}",
    "transport.server_key_file=server",
    "transport.allowed_keys_file=allowed",
    "transport.server_public_key_file=public",
    "transport.client_key_file=client",
)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one pod, or one node of a job, needs."""

    gpus: int
    cores: int
    memory_gib: int


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """A run as the files start it. overrides: settings of the command line, which the daemons get too."""

    config: Config
    config_file: str
    overrides: tuple[str, ...]
    label: str  # run.name as names of a cluster allow it
    generators: int  # at first
    rollout_port: int
    learner: Resources  # of each node
    generator: Resources
    disk_gib: int
    notes: tuple[str, ...]  # what could not be known here

    @property
    def generator_prefix(self) -> str:
        """What generator.id begins with; a number follows."""
        return f"{self.label}-generator-"


def cluster_run(path: str, overrides: Sequence[str], num_generators: int | None) -> ClusterRun:
    """Reads and checks a configuration for a cluster. Raises ConfigError for what cannot work between hosts."""
    written = written_values(path, overrides)
    raise_all(list(_problems(written)))
    address = str(written.get("transport.address", AUTO))
    port = ROLLOUT_PORT if address == AUTO else rollout_address(address).port
    stands = [*FOUND_THERE, f"transport.address=tcp://{STANDS_FOR}:{port}"]
    if not written.get("learner.port"):
        stands.append(f"learner.port={RENDEZVOUS_PORT}")
    config = load_config(path, [*overrides, *stands])
    notes: list[str] = []
    learner, generator, disk = _sizes(config, notes)
    return ClusterRun(
        config,
        path,
        tuple(overrides),
        _label(config.run.name),
        DEFAULT_GENERATORS if num_generators is None else num_generators,
        port,
        learner,
        generator,
        disk,
        tuple(notes),
    )


def _problems(written: Mapping[str, Any]) -> Iterator[str]:
    """What the user wrote that cannot work between hosts."""
    leave_out = "leave it out: the file finds the learner's address where it runs"
    address = str(written.get("transport.address", AUTO))
    if "," in address or address.startswith(FILE):
        yield f"transport.address={address} names several places; on a cluster {leave_out}"
    elif address != AUTO and rollout_address(address).is_loopback:
        yield f"transport.address={address} cannot be reached from other hosts; {leave_out}"
    host = str(written.get("weights.host", ""))
    if host and is_loopback(host):
        yield f"weights.host={host} cannot be reached from other hosts; {leave_out}"
    if written.get("weights.backend") == "ipc":
        yield "weights.backend=ipc shares memory of one machine; on a cluster set weights.backend=auto, nccl or gloo"
    for key in ("learner.http", "generator.http"):
        if written.get(key, AUTO) != AUTO:
            yield f"{key}={written[key]}: on a cluster the file sets it, for health probes; leave it out"


def _sizes(config: Config, notes: list[str]) -> tuple[Resources, Resources, int]:
    """What a node of the learner and a generator need, and GiB of the shared folder."""
    parallel = config.generator.tensor_parallel_size
    ranks = config.learner.ranks
    # auto stands for a GPU: the host that prints the files says nothing about those of the cluster.
    trains_on_gpu, samples_on_gpu = (
        is_on_gpu(section.device, gpu_here=True) for section in (config.learner, config.generator)
    )
    ours: list[Need] = []
    theirs: list[Need] = []
    try:
        model = find_model(config.model.path)
        ours = learner_needs(config, model, on_gpu=trains_on_gpu)
        theirs = generator_needs(config, model, on_gpu=samples_on_gpu)
        for role, needs in (("a rank of the learner", ours), ("a generator", theirs)):
            if on_gpu := _gib(needs, GPU, spare=1.0):
                notes.append(f"{role} needs about {on_gpu} GiB of each GPU, by the forecast of --dry-run")
    except ModelError as error:
        notes.append(f"the model is not on this host, so memory and disk are guesses: {str(error).splitlines()[0]}")
    learner = Resources(
        ranks if trains_on_gpu else 0,
        ranks * config.learner.threads + SPARE_CORES,
        _gib(ours, HOST) or 64,
    )
    workers = config.generator.reward_workers + SPARE_CORES
    generator = Resources(
        parallel if samples_on_gpu else 0, parallel * config.generator.threads + workers, _gib(theirs, HOST) or 32
    )
    return learner, generator, _gib(ours, DISK) or 500


def _gib(needs: Sequence[Need], place: str, spare: float = SPARE) -> int:
    return math.ceil(spare * sum(need.num_bytes for need in needs if need.place == place) / GIB)


def _label(name: str) -> str:
    """A run's name in the alphabet of DNS, which the names of clusters keep to."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    # A service's name begins with a letter; and a number would not be a text in a manifest.
    return (label if label[:1].isalpha() else f"run-{label}")[:40].strip("-")


def filled(template: str, words: Mapping[str, str]) -> str:
    """The template with each @NAME@ replaced by its words, once: what they hold stays as it is."""
    return re.sub(r"@([A-Z_]+)@", lambda found: words.get(found[1], found[0]), template)

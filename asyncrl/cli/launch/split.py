"""How one host is divided between the learner and its generators: GPUs by what the forecasts say, cores by nobody.

GPUs     The learner takes the fewest that hold it, and a quarter of all at least; generators take the rest, each as
         many as hold its weights and a KV cache of some use. One GPU is shared: the engine gets what is left of it.
CPUs     Both sides may use all cores and nothing is pinned: whichever side bounds the run has the cores that the other
         leaves idle. A core a side is a fifth slower where one side bounds. Passes are short, and more sequences are
         decoded at once than by default.

What the user wrote, in the file or on the command line, is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from asyncrl.cli.forecast import GPU, HOST, Need, generator_needs, kv_cache, learner_needs
from asyncrl.cli.hardware import Hardware
from asyncrl.config import Config
from asyncrl.config.host_checks import is_on_gpu
from asyncrl.errors import ConfigError
from asyncrl.host.model_folder import ModelFiles

MAX_THREADS = 16  # of one process: more do not pay for the small models that a CPU can train
CPU_SEQUENCES = 128  # decoded at once on CPUs, where the engine's own work per step is divided among them
CPU_MICRO_BATCH = 2048  # tokens of a pass on CPUs: its tensors stay near the caches, and are not mapped anew each time
GPU_SHARE = 0.92  # of a GPU that a forecast may fill: fragments, and what other libraries take
USEFUL_SEQUENCES = 16  # of full length in a KV cache, from which on a generator is worth its GPUs
LEARNER_SHARE = 4  # the learner takes one GPU of so many at least


@dataclass(frozen=True, slots=True)
class Portion:
    """What one daemon of this host gets: settings on top of the configuration, and environment variables."""

    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostSplit:
    """The daemons of one host, in words and in settings. problems: what does not fit, each with a remedy."""

    learner: Portion
    generators: tuple[Portion, ...]
    line: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DividedHost:
    """What there is to divide. gpus: names of the GPUs as CUDA_VISIBLE_DEVICES takes them."""

    hardware: Hardware
    cores: int
    gpus: tuple[str, ...] = ()


def visible_gpus(count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that a process with this environment may use, of `count` that the host has."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(map(str, range(count)))
    return tuple(name for part in listed.split(",") if (name := part.strip()) and not name.startswith("-"))


def split_host(
    config: Config, written: Set[str], model: ModelFiles, host: DividedHost, num_generators: int | None = None
) -> HostSplit:
    """Divides the host. written: keys that the user set; num_generators: None leaves the number to us.

    Raises ConfigError where the GPUs do not go round.
    """
    there = len(host.gpus) > 0
    on_gpu = [is_on_gpu(section.device, gpu_here=there) for section in (config.learner, config.generator)]
    splitter = _Splitter(config, written, model, host)
    if any(on_gpu) and not there:
        raise ConfigError("a device is cuda, but no GPU is to be used here; set learner.device and generator.device")
    if all(on_gpu):
        return splitter.shared_gpu(num_generators) if len(host.gpus) == 1 else splitter.gpus(num_generators)
    if any(on_gpu):
        return splitter.mixed(num_generators, learner_on_gpu=on_gpu[0])
    return splitter.cores(num_generators or 1)


class _Splitter:
    def __init__(self, config: Config, written: Set[str], model: ModelFiles, host: DividedHost) -> None:
        self._config = config
        self._written = written
        self._model = model
        self._host = host
        self._gpu_bytes = host.hardware.gpu_bytes

    # -- cores -----------------------------------------------------------------------------------------------------

    def cores(self, count: int) -> HostSplit:
        """Everything on CPUs."""
        learner, generator = self._learner_threads(), self._generator_threads(count)
        line = (
            f"{_number(self._host.cores, 'core')}: the learner has {self._threads_of('learner', learner)}, "
            f"{_number(count, 'generator')} {self._threads_of('generator', generator)}{' each' if count > 1 else ''}; "
            f"{self._pinning()}"
        )
        learner = (*learner, *self._micro_batch())
        generator = (*generator, *self._sequences(count))
        return self._checked(Portion(learner), (Portion(generator),) * count, line, gpus=(False, False))

    def _sequences(self, count: int) -> tuple[str, ...]:
        """More sequences than by default, where the bound on age lets so many be under way and the KV cache holds."""
        config = self._config
        if "generator.max_sequences" in self._written:
            return ()
        group = config.sampling.group_size
        under_way = (config.staleness.max_age + 1) * config.learner.groups_per_step * group // count
        needs = generator_needs(config, self._model, on_gpu=False)
        held = kv_cache(config, self._model, needs, None, on_gpu=False)
        most = min(CPU_SEQUENCES, under_way, CPU_SEQUENCES if held is None else held)
        most -= most % group
        return (f"generator.max_sequences={most}",) if most > config.generator.max_sequences else ()

    def _micro_batch(self) -> tuple[str, ...]:
        if "learner.micro_batch_tokens" in self._written:
            return ()
        return (f"learner.micro_batch_tokens={max(CPU_MICRO_BATCH, self._config.model.max_length)}",)

    def _learner_threads(self) -> tuple[str, ...]:
        if self._written & {"learner.threads", "learner.cpus"}:
            return ()
        ranks = self._config.learner.ranks
        return (f"learner.threads={max(1, min(MAX_THREADS, self._host.cores // ranks))}",)

    def _generator_threads(self, count: int) -> tuple[str, ...]:
        if self._written & {"generator.threads", "generator.cpus"}:
            return ()
        workers = count * self._config.generator.tensor_parallel_size
        return (f"generator.threads={max(1, min(MAX_THREADS, self._host.cores // workers))}",)

    def _threads_of(self, role: str, settings: Sequence[str]) -> str:
        count = int(settings[0].partition("=")[2]) if settings else getattr(self._config, role).threads
        return _number(count, "thread")

    def _pinning(self) -> str:
        pinned = [
            f"{role}.cpus={cpus}" for role in ("learner", "generator") if (cpus := getattr(self._config, role).cpus)
        ]
        return f"pinned by {' and '.join(pinned)}" if pinned else "nothing is pinned"

    # -- GPUs ------------------------------------------------------------------------------------------------------

    def shared_gpu(self, num_generators: int | None) -> HostSplit:
        """Learner and one generator on one GPU."""
        if (num_generators or 1) > 1:
            raise ConfigError(
                f"--generators {num_generators} on one GPU: its memory would be divided among engines; give 1"
            )
        settings: tuple[str, ...] = ()
        fraction = self._config.generator.gpu_memory_fraction
        needed = _on_gpu(learner_needs(self._config, self._model, on_gpu=True))
        if self._gpu_bytes and "generator.gpu_memory_fraction" not in self._written:
            fraction = min(fraction, int(100 * (GPU_SHARE - needed / self._gpu_bytes)) / 100)
            if fraction <= 0.05:
                raise ConfigError(
                    f"the learner needs {_gib(needed)} of the GPU's {_gib(self._gpu_bytes)}, which leaves no room for "
                    "an engine; lower learner.micro_batch_tokens, set update.what=lora, or use two GPUs"
                )
            settings = (f"generator.gpu_memory_fraction={fraction:g}",)
        line = f"one GPU, shared: the learner needs {_gib(needed)}, one generator may take {100 * fraction:.0f} % of it"
        here = {"CUDA_VISIBLE_DEVICES": self._host.gpus[0]}
        return self._checked(
            Portion((), here), (Portion(settings, here),), line, gpus=(True, True), fraction=fraction, taken=needed
        )

    def gpus(self, num_generators: int | None) -> HostSplit:
        """Some GPUs for the learner's ranks, the rest for generators."""
        total = len(self._host.gpus)
        parallel = self._tensor_parallel_size()
        ranks = self._ranks(total, parallel, num_generators)
        count = (total - ranks) // parallel if num_generators is None else num_generators
        if ranks < 1 or count < 1 or ranks + count * parallel > total:
            raise ConfigError(
                f"{total} GPUs do not hold {_number(ranks, 'rank')} of the learner and "
                f"{_number(count or 1, 'generator')} of {parallel} GPUs each; "
                "lower learner.ranks, generator.tensor_parallel_size or --generators, or use more GPUs"
            )
        names = self._host.gpus
        learner = Portion((f"learner.ranks={ranks}",), {"CUDA_VISIBLE_DEVICES": ",".join(names[:ranks])})
        generators = []
        for number in range(count):
            own = names[ranks + number * parallel :][:parallel]
            settings = (f"generator.tensor_parallel_size={parallel}",)
            generators.append(Portion(settings, {"CUDA_VISIBLE_DEVICES": ",".join(own)}))
        idle = total - ranks - count * parallel
        line = (
            f"{total} GPUs: {_number(ranks, 'rank')} of the learner on {_list(names[:ranks])}, "
            f"{_number(count, 'generator')} of {_number(parallel, 'GPU')}{' each' if count > 1 else ''} on "
            f"{_list(names[ranks : total - idle])}{f'; {_list(names[total - idle :])} idle' if idle else ''}"
        )
        return self._checked(learner, tuple(generators), line, gpus=(True, True))

    def mixed(self, num_generators: int | None, *, learner_on_gpu: bool) -> HostSplit:
        """One side on the GPUs, the other on the cores."""
        names = self._host.gpus
        everything = {"CUDA_VISIBLE_DEVICES": ",".join(names)}
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        if learner_on_gpu:
            count = num_generators or 1
            ranks = self._config.learner.ranks if "learner.ranks" in self._written else len(names)
            learner = Portion((f"learner.ranks={ranks}",), everything)
            generators = (Portion(self._generator_threads(count), hidden),) * count
            line = f"the learner on {_number(ranks, 'GPU')}, {_number(count, 'generator')} on the cores"
            return self._checked(learner, generators, line, gpus=(True, False))
        parallel = self._tensor_parallel_size()
        count = len(names) // parallel if num_generators is None else num_generators
        if count < 1 or count * parallel > len(names):
            raise ConfigError(
                f"{len(names)} GPUs do not hold {count or 1} generators of {parallel} GPUs each; lower "
                "generator.tensor_parallel_size or --generators"
            )
        own = [names[number * parallel :][:parallel] for number in range(count)]
        settings = (f"generator.tensor_parallel_size={parallel}",)
        places = tuple(Portion(settings, {"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in own)
        line = f"the learner on the cores, {_number(count, 'generator')} of {_number(parallel, 'GPU')} each"
        learner = Portion((*self._learner_threads(), *self._micro_batch()), hidden)
        return self._checked(learner, places, line, gpus=(False, True))

    def _tensor_parallel_size(self) -> int:
        """What the user wrote, or the smallest power of two with which an engine holds its weights and a KV cache."""
        config = self._config
        if "generator.tensor_parallel_size" in self._written or self._gpu_bytes is None:
            return config.generator.tensor_parallel_size
        sizes = _powers_up_to(max(1, len(self._host.gpus) - 1))
        return next((size for size in sizes if self._engine_fits(size)), sizes[-1])

    def _engine_fits(self, size: int) -> bool:
        config = _with(self._config, lambda other: setattr(other.generator, "tensor_parallel_size", size))
        needs = generator_needs(config, self._model, on_gpu=True)
        held = kv_cache(config, self._model, needs, self._gpu_bytes, on_gpu=True)
        assert self._gpu_bytes is not None
        within = _on_gpu(needs) <= config.generator.gpu_memory_fraction * self._gpu_bytes
        return within and (held is None or held >= min(USEFUL_SEQUENCES, config.generator.max_sequences))

    def _ranks(self, total: int, parallel: int, num_generators: int | None) -> int:
        """What the user wrote; else the smallest power of two that fits, or more where the rest is of no use."""
        config = self._config
        if "learner.ranks" in self._written:
            return config.learner.ranks
        sizes = _powers_up_to(total - parallel * (num_generators or 1))
        if not sizes or num_generators is not None:
            return sizes[-1] if sizes else 0
        enough = [size for size in sizes if size >= total // LEARNER_SHARE] or sizes[-1:]
        return next((size for size in enough if self._learner_fits(size)), sizes[-1])

    def _learner_fits(self, ranks: int) -> bool:
        config = _with(self._config, lambda other: setattr(other.learner, "ranks", ranks))
        return (
            not self._gpu_bytes
            or _on_gpu(learner_needs(config, self._model, on_gpu=True)) <= GPU_SHARE * self._gpu_bytes
        )

    # -- whether it fits -------------------------------------------------------------------------------------------

    def _checked(
        self,
        learner: Portion,
        generators: tuple[Portion, ...],
        line: str,
        *,
        gpus: tuple[bool, bool],
        fraction: float | None = None,
        taken: int = 0,
    ) -> HostSplit:
        """The split, and what does not fit. gpus: whether the learner, and generators, are on GPUs."""
        config = _with(self._config, lambda other: _apply(other, (*learner.settings, *generators[0].settings)))
        ours = learner_needs(config, self._model, on_gpu=gpus[0])
        theirs = generator_needs(config, self._model, on_gpu=gpus[1])
        problems = []
        host = _sum(ours, HOST) + len(generators) * _sum(theirs, HOST)
        available = self._host.hardware.host_bytes
        if available is not None and host > available:
            problems.append(
                f"{_gib(host)} of host memory are needed by all together, {_gib(available)} are there; lower "
                "generator.kv_cache_gib, learner.micro_batch_tokens or --generators, or take a larger machine"
            )
        if self._gpu_bytes:
            if gpus[0] and _on_gpu(ours) > self._gpu_bytes:
                problems.append(
                    f"the learner needs {_gib(_on_gpu(ours))} of each GPU, which has {_gib(self._gpu_bytes)}; raise "
                    "learner.ranks, lower learner.micro_batch_tokens, set learner.activation_checkpointing=full or "
                    "update.what=lora"
                )
            limit = (fraction or config.generator.gpu_memory_fraction) * self._gpu_bytes
            if gpus[1] and _on_gpu(theirs) > limit:
                problems.append(
                    f"an engine needs {_gib(_on_gpu(theirs))} of each GPU before any KV cache, and may take "
                    f"{_gib(int(limit))}{f', for the learner needs {_gib(taken)}' if taken else ''}; raise "
                    "generator.tensor_parallel_size, or use more GPUs"
                )
        return HostSplit(learner, generators, line, tuple(problems))


def _with(config: Config, change: Callable[[Config], object]) -> Config:
    other = copy.deepcopy(config)
    change(other)
    return other


def _apply(config: Config, settings: Sequence[str]) -> None:
    """Sets the numbers that this module chose."""
    for setting in settings:
        name, _, value = setting.partition("=")
        section, _, entry = name.partition(".")
        held = getattr(config, section)
        setattr(held, entry, type(getattr(held, entry))(float(value)))


def _powers_up_to(most: int) -> list[int]:
    return [2**power for power in range(max(0, most).bit_length())]


def _sum(needs: Sequence[Need], place: str) -> int:
    return sum(need.num_bytes for need in needs if need.place == place)


def _on_gpu(needs: Sequence[Need]) -> int:
    return _sum(needs, GPU)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _list(names: Sequence[str]) -> str:
    return f"GPU {names[0]}" if len(names) == 1 else f"GPUs {', '.join(names)}"

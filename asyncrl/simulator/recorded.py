"""Service times and lengths of a run that was made, so that it can be simulated with other sizes.

What a run writes down is taken as it is: lengths from the journal, the times of steps and of weight syncs from
metrics.jsonl. Two things it does not write down are found by simulating the run itself: the speed of the engine, so
that tokens per busy second of the generators agree, and, where learner and generators share cores, the time of a step
on cores of its own. `Fit.ratio` says how well the simulation of the run then agrees with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from asyncrl.config import Config
from asyncrl.config.gpus import has_gpu
from asyncrl.config.host_checks import is_on_gpu
from asyncrl.errors import UserError
from asyncrl.metrics import METRICS_FILE, iterate_records
from asyncrl.metrics.ledger import LearnerActivity
from asyncrl.metrics.types import StepMetrics, SyncMetrics
from asyncrl.simulator.model import Service, SharedCores, Sizes
from asyncrl.simulator.outcome import SimulatedOutcome
from asyncrl.simulator.run import SimulatedRun
from asyncrl.simulator.times import Constant, Distribution, Measured, measured
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import StoredGroup

MIN_STEPS = 10
WARM_UP_SHARE = 0.2  # of a run's steps: its first batches wait for the first tokens
GRANT_S = 0.02  # a beat, its gathering and the lease
FIXED_SHARE = 0.5  # of the decode step of a full engine, where the run does not tell
ROUNDS = 8
CLOSE_ENOUGH = 0.002


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What a run measured, over its steps after the first fifth. Rates are per second, tokens completion tokens."""

    steps: int
    tokens_per_s: float
    age_mean: float
    step_s: tuple[float, ...]
    busy_tokens_per_s: float
    generators: int
    snapshot_s: tuple[float, ...]
    stage_s: tuple[float, ...]
    pause_s: tuple[float, ...]
    commit_s: tuple[float, ...]
    lengths: tuple[float, ...]
    engine_step_s: dict[str, float]  # by part, empty where the run does not tell
    checkpoint_s: tuple[float, ...] = ()
    checkpoint_write_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Fit:
    """A run as it can be simulated, and the simulation of the run itself beside what it measured."""

    sizes: Sizes
    service: Service
    shared: SharedCores | None
    figures: RunFigures
    itself: SimulatedOutcome

    @property
    def assumes_fixed_share(self) -> bool:
        """Whether nobody measured how much of a decode step is there with few sequences too."""
        return not self.figures.engine_step_s

    @property
    def ratio(self) -> float:
        """Simulated tokens per second / measured ones."""
        return self.itself.tokens_per_s / self.figures.tokens_per_s


def read_figures(folder: Path) -> RunFigures:
    """Reads metrics and journal of a run.

    Raises UserError where there is no run, or one of fewer than MIN_STEPS steps.
    """
    path = folder / METRICS_FILE
    records = _read_records(folder)
    steps = _counted_steps(folder, records)
    syncs = [
        record
        for record in records
        if record.get("kind") == SyncMetrics.kind and not record.get("catch_up") and not record.get("generators_failed")
    ]
    trained = _total(steps, "tokens_trained")
    seconds = _total(steps, "interval_s")
    busy_s = _total(steps, "generator_busy_s")
    if not trained or not seconds or not busy_s:
        raise UserError(f"{path} has no tokens or no times: it cannot be simulated")
    aged = [(float(step["policy_age_mean"]), float(step["tokens_trained"])) for step in steps]
    pauses, canaries = _ms(syncs, "pause_ms"), _ms(syncs, "canary_ms")
    rest = fmean(pauses or [0.0]) + fmean(canaries or [0.0])
    return RunFigures(
        steps=len(steps),
        tokens_per_s=trained / seconds,
        age_mean=sum(age * tokens for age, tokens in aged) / trained,
        step_s=tuple(_at_work_s(step) for step in steps if step.get("step_s")),
        busy_tokens_per_s=_total(steps, "tokens_generated") / busy_s,
        generators=max(int(step.get("generators_alive") or 1) for step in steps),
        snapshot_s=_ms(steps, "publish_blocked_ms"),
        stage_s=tuple(max(0.0, total - rest) for total in _ms(syncs, "total_ms")),
        pause_s=pauses,
        commit_s=canaries,
        lengths=_with_mean(read_lengths(folder / "journal"), trained, _total(steps, "rollouts_trained")),
        engine_step_s=_engine_step_s(steps),
        checkpoint_s=_times(records, "learner_time_s", "checkpoint")[:-1],  # the last one is the end of the run
        checkpoint_write_s=_times(records, "overlapped_s", "checkpoint"),
    )


def _times(records: Iterable[Mapping[str, Any]], figure: str, part: str) -> tuple[float, ...]:
    """A part of a figure, of the records that have it."""
    return tuple(float(seconds) for record in records if (seconds := (record.get(figure) or {}).get(part)))


def _at_work_s(step: Mapping[str, Any]) -> float:
    """What a step takes the trainer with its messages; without them where the run does not tell where time went."""
    time_s = step.get("learner_time_s") or {}
    work = (LearnerActivity.COMPUTE, LearnerActivity.RANKS, LearnerActivity.MESSAGES, LearnerActivity.OTHER)
    return sum(time_s.get(activity, 0.0) for activity in work) or float(step["step_s"])


def _with_mean(lengths: Sequence[float], tokens: float, rollouts: float) -> tuple[float, ...]:
    """The lengths, scaled to those of the steps: the journal keeps the newest alone, and lengths drift in training."""
    if not lengths or not rollouts:
        return tuple(lengths)
    scale = tokens / rollouts / fmean(lengths)
    return tuple(scale * length for length in lengths)


def _engine_step_s(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The parts of an engine's step, in seconds: the median over the steps of the run that have them."""
    told = [parts for step in steps if (parts := step.get("engine_step_ms"))]
    return {name: median(parts[name] for parts in told if name in parts) / 1e3 for name in (told[0] if told else ())}


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps after the first fifth. Raises UserError as `read_figures`."""
    return _counted_steps(folder, _read_records(folder))


def _read_records(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    if not path.exists():
        raise UserError(f"{path}: there is no such file; give the run.dir of a run that has trained")
    return [record for record in iterate_records(path) if record is not None]


def _counted_steps(folder: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = [record for record in records if record.get("kind") == StepMetrics.kind]
    if len(steps) < MIN_STEPS:
        raise UserError(f"{folder} has {len(steps)} steps; a run of {MIN_STEPS} or more can be simulated")
    return steps[int(WARM_UP_SHARE * len(steps)) :]


def read_lengths(folder: Path) -> list[float]:
    """Completion tokens of every rollout in the journal; empty without one."""
    lengths: list[float] = []
    for path in sorted(folder.glob("*.segment")):
        try:
            entries = list(JournalReader(folder, [int(path.stem)]))
        except FileNotFoundError:
            continue  # the learner deleted it meanwhile
        groups = (entry.record for entry in entries if isinstance(entry.record, StoredGroup))
        lengths += [float(tokens) for group in groups for tokens in group.num_tokens]
    return lengths


def sizes_of(config: Config, generators: int, steps: int) -> Sizes:
    """The sizes of a run of this configuration."""
    return Sizes(
        generators=generators,
        max_sequences=config.generator.max_sequences,
        group_size=config.sampling.group_size,
        groups_per_step=config.learner.groups_per_step,
        max_age=config.staleness.max_age,
        steps=steps,
        cell_size=config.weights.cell_size,
        eval_every=config.eval.every,
        eval_prompts=config.eval.prompts,
        eval_samples=config.eval.samples,
        checkpoint_every=config.checkpoint.every,
    )


def fit_run(
    folder: Path,
    config: Config,
    *,
    shared: SharedCores | None,
    seed: int = 0,
    steps: int | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Fit:
    """Makes a run that can be simulated out of one that was made.

    config: what the run was started with. shared: the cores that its sides shared (`shared_cores`), None without any.
    steps: of its simulations; None: as many as the run has, between 60 and 200. go_on: asked before each simulation
    but the first; where it says no, the fit is as close as it came.

    Raises UserError as `read_figures`.
    """
    figures = read_figures(folder)
    sizes = sizes_of(config, figures.generators, steps or max(60, min(200, figures.steps)))
    service = _first_guess(figures, sizes)
    decode_scale = step_scale = 1.0
    scaled = service
    for round_number in range(ROUNDS):
        if round_number and not go_on():
            break
        scaled = _scaled(service, decode_scale, step_scale)
        itself = SimulatedRun(sizes, scaled, shared=shared, seed=seed).run()
        faster = itself.generated_per_busy_s / figures.busy_tokens_per_s
        shorter = fmean(figures.step_s) / itself.step_s_mean
        if abs(faster - 1) < CLOSE_ENOUGH and (shared is None or abs(shorter - 1) < CLOSE_ENOUGH):
            break
        decode_scale *= faster
        step_scale *= shorter if shared is not None else 1.0
    return Fit(sizes, scaled, shared, figures, itself)


def _first_guess(figures: RunFigures, sizes: Sizes) -> Service:
    """As if every step had had the cores for itself.

    What no generator measured of the engine's step is as if engines had been full whenever they were busy.
    """
    decode_step_s = sizes.max_sequences / figures.busy_tokens_per_s
    parts = figures.engine_step_s or {
        "fixed": FIXED_SHARE * decode_step_s,
        "sequence": (1 - FIXED_SHARE) * decode_step_s / sizes.max_sequences,
    }
    step_s: Distribution = Measured(figures.step_s) if figures.step_s else Constant(1.0)
    return Service(
        completion_tokens=measured(figures.lengths, 1.0),
        decode_s=parts["fixed"],
        decode_sequence_s=parts["sequence"],
        new_sequence_s=parts.get("new_sequence", 0.0),
        step_s=step_s,
        snapshot_s=measured(figures.snapshot_s, 0.0),
        stage_s=measured(figures.stage_s, 0.0),
        pause_s=measured(figures.pause_s, 0.0),
        commit_s=measured(figures.commit_s, 0.0),
        grant_s=GRANT_S,
        checkpoint_s=measured(figures.checkpoint_s, 0.0),
        checkpoint_write_s=measured(figures.checkpoint_write_s, 0.0),
    )


def _scaled(service: Service, decode: float, step: float) -> Service:
    assert isinstance(service.step_s, Measured | Constant)
    if isinstance(service.step_s, Measured):
        step_s: Distribution = Measured(tuple(step * value for value in service.step_s.values))
    else:
        step_s = Constant(step * service.step_s.value)
    return replace(
        service,
        decode_s=decode * service.decode_s,
        decode_sequence_s=decode * service.decode_sequence_s,
        new_sequence_s=decode * service.new_sequence_s,
        step_s=step_s,
    )


def shared_cores(config: Config) -> SharedCores | None:
    """The cores of this host, where both sides compute on the CPU and meet on one host; None elsewhere."""
    devices = (config.learner.device, config.generator.device)
    address = config.transport.address
    one_host = address == "auto" or address.startswith(("ipc://", "tcp://127.", "tcp://localhost"))
    if not one_host or any(is_on_gpu(device, gpu_here=has_gpu()) for device in devices):
        return None
    cores = len(os.sched_getaffinity(0))
    # `asyncrl run` gives each side all cores that nobody is pinned to; the run folder has the learner's settings alone.
    generator_threads = len(config.generator.cpus) or cores
    return SharedCores(cores, config.learner.threads, generator_threads)


def _total(records: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(float(record.get(name) or 0) for record in records)


def _ms(records: Iterable[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    return tuple(float(value) / 1e3 for record in records if (value := record.get(name)) is not None)

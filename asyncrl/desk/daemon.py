"""The learner daemon: restores the run, opens the sockets, starts the trainer, and lets the desk serve.

The process of the daemon *is* the desk: it has no torch, so it listens within a fraction of a second, and it starts
the trainer's ranks as children. The kernel takes them along when the desk is killed, so one kill leaves nothing behind.

Order at the start: lock and read the run folder, refuse what cannot be gone on with → raise the run epoch durably →
bind → write the configuration → start the trainer. Nobody can reach a learner that has not fenced its predecessor.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from asyncrl.config import Config
from asyncrl.config.checks import largest_group_bytes
from asyncrl.config.gpus import has_gpu
from asyncrl.config.host_checks import is_on_gpu
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.bad_batches import BadBatches
from asyncrl.desk.batches import BatchDealer
from asyncrl.desk.desk import Desk
from asyncrl.desk.evaluation import Evaluator
from asyncrl.desk.generators import Generators
from asyncrl.desk.intake import Intake
from asyncrl.desk.opening.restoring import checkpoint_folder, restore_run
from asyncrl.desk.opening.run_folder import open_run
from asyncrl.desk.opening.run_record import write_finished, write_record
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.desk.proofs import Proofs
from asyncrl.desk.ranks import Ranks
from asyncrl.desk.run_state import RunState
from asyncrl.desk.trainer_process import TrainerProcess, rank_layout
from asyncrl.desk.versions import Versions
from asyncrl.host.addresses import first_of_this_host, ipc_address, rollout_addresses
from asyncrl.host.model_config import read_model_config, vocab_size
from asyncrl.host.processes import StopSignal, pin_to
from asyncrl.link.curve_keys import server_auth
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.trainer_link import MAX_FRAME_BYTES
from asyncrl.metrics import METRICS_FILE, EvalMetrics, Metrics, StepMetrics, SyncMetrics, newest_version
from asyncrl.metrics.exposition import Exposition
from asyncrl.metrics.health import Pulse
from asyncrl.metrics.http_pages import HttpPages, Vitals
from asyncrl.report.advisor import Advice, AdviseWhile
from asyncrl.report.rollouts.files import ROLLOUTS_FOLDER
from asyncrl.report.rollouts.jobs import WriterSetup
from asyncrl.report.rollouts.writer import CLOSE_TIMEOUT_S, RolloutWriter
from asyncrl.storage.room import GIB
from asyncrl.tasks.helper import TaskHelper
from asyncrl.tasks.trial import helper_setup
from asyncrl.weights.plan.planner import SyncPlanner

log = logging.getLogger(__name__)

MAX_HURRIED_BYTES = 32 * 2**20  # of metrics, about 10,000 steps: a second or two to report on
MIN_RECEIVED_BYTES = 4 * 2**20  # a beat with its leases and their tickets, the digests of a large model
SHORT_CLOSE_S = 2.0  # for rollouts that are still being written when a signal ends the run
# Nats, where weights.canary_tolerance is 0. On GPUs vLLM multiplies in TF32 inside of its attention also in float32.
CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.35}
GPU_CANARY_TOLERANCE = {"float32": 0.02, "bfloat16": 0.35}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the desk is connected to: the two sockets, the trainer's process, the metrics, the signals, its pulse.

    rollouts writes some of them; None: none are written.
    """

    rollout_socket: ServerSocket
    trainer_socket: ServerSocket
    process: TrainerProcess
    metrics: Metrics
    stop: StopSignal
    pulse: Pulse = field(default_factory=Pulse)
    rollouts: RolloutWriter | None = None


def run_learner(config: Config, stop: StopSignal | None = None, advise: AdviseWhile | None = None) -> int:
    """Runs one learner to the end of its run, or to a signal. Returns its exit code; raises AsyncRLError otherwise.

    stop: what ends it early; None makes one of its own. advise: says at the end what to change in the run.
    """
    stop = stop or StopSignal()
    pin_to(config.learner.cpus, "learner.cpus")
    run_dir = Path(config.run.dir)
    with ExitStack() as open_things:
        run = open_run(config)
        open_things.enter_context(closing(run.journal))
        if run.is_finished(config.run.steps):
            _say_finished(config, run_dir)
            return 0
        run_epoch = run.begin(run_dir, time.monotonic())
        vitals = Vitals("learner", config.run.name, Pulse(), Exposition(StepMetrics, SyncMetrics, EvalMetrics))
        if (pages := HttpPages.open(config.learner.http, "learner.http", vitals, run_dir)) is not None:
            open_things.enter_context(closing(pages))
        rollouts = _rollout_writer(config)
        # Whoever stops a run does not wait for what it said.
        open_things.callback(lambda: rollouts.close(CLOSE_TIMEOUT_S if stop.received is None else SHORT_CLOSE_S))
        # Beside all else: it imports the tokenizer's library and reads the task's data, which takes seconds.
        helper = open_things.enter_context(closing(TaskHelper(helper_setup(config))))
        helper.start(time.monotonic())
        rollout_socket = open_things.enter_context(closing(_rollout_socket(config)))
        config_file = write_record(run_dir, config, run.record)
        trainer_socket = open_things.enter_context(closing(_trainer_socket(run_dir)))
        log.info("listening on %s (run %s, run epoch %d)", rollout_socket.address, config.run.name, run_epoch)
        process = _trainer_process(config, config_file, trainer_socket.address)
        process.start()
        open_things.callback(process.kill)  # for the case that the metrics cannot be opened
        tolerance = _alarmed_tolerance(config)
        metrics = open_things.enter_context(closing(Metrics.open(config, tolerance, more=[vitals.figures])))
        open_things.callback(process.kill)  # before all else: closing the metrics may wait for the network
        surroundings = Surroundings(rollout_socket, trainer_socket, process, metrics, stop, vitals.pulse, rollouts)
        state = restore_run(config, run_epoch, run.journal, run.saved)
        code = make_desk(config, state, LeasedPrompts(helper, state.leases), surroundings).run()
        if stop.received is None:
            write_finished(run_dir, config, state.policy.trained)
    _report(run_dir, advise, stop)
    return code


def _report(run_dir: Path, advise: AdviseWhile | None, stop: StopSignal) -> None:
    """Writes summary.json and report.html, and prints the last lines.

    After a signal somebody waits for the end: nothing is thought over, and a long run, whose report takes seconds,
    gets none.
    """
    hurried = stop.received is not None
    if hurried and (run_dir / METRICS_FILE).stat().st_size > MAX_HURRIED_BYTES:
        log.info("the run is long, and somebody waits for its end: `asyncrl report %s` writes its report", run_dir)
        return
    from asyncrl.report.writing import report  # not at the start, which generators wait for

    report(run_dir, None if hurried or advise is None else partial(_advice, advise, stop))


def _advice(advise: AdviseWhile, stop: StopSignal, run_dir: Path) -> Advice:
    """What to change in a run that is over. Neither a fault of it nor its length keeps anybody from the summary."""
    try:
        return advise(run_dir, lambda: stop.received is None)
    except Exception as error:
        log.exception("what to change in the run is not known: its simulation failed")
        return Advice(note=f"nothing is predicted: the simulation of the run failed ({error!r}); the log tells where")


def make_desk(config: Config, state: RunState, prompts: LeasedPrompts, surroundings: Surroundings) -> Desk:
    """Joins the desk's parts around the state of the run."""
    metrics = surroundings.metrics
    proofs = Proofs(state.policy, config.staleness.max_age)
    acknowledgements = Acknowledgements(state.journal, state.sessions, state.counters)
    intake = Intake(
        config,
        vocab_size=vocab_size(read_model_config(Path(config.model.path), f"model.path={config.model.path}")),
        state=state,
        prompts=prompts,
        proofs=proofs,
        acknowledgements=acknowledgements,
    )
    evaluator = Evaluator(
        config,
        num_prompts=prompts.num_evals,
        leases=state.leases,
        acknowledgements=acknowledgements,
        metrics=metrics,
        done=state.evals_done,
        prompts=prompts,
        rollouts=surroundings.rollouts,
    )
    dealer = _dealer(config, state)
    ranks = _ranks(config, state, acknowledgements, dealer, prompts, surroundings)
    versions = Versions(
        planner=_sync_planner(config, state),
        socket=surroundings.trainer_socket,
        state=state,
        proofs=proofs,
        evaluator=evaluator,
        metrics=metrics,
        on_first_proof=ranks.begin,
    )
    generators = Generators(
        config,
        socket=surroundings.rollout_socket,
        state=state,
        prompts=prompts,
        acknowledgements=acknowledgements,
        versions=versions,
    )
    return Desk(
        config,
        state=state,
        acknowledgements=acknowledgements,
        intake=intake,
        generators=generators,
        prompts=prompts,
        ranks=ranks,
        versions=versions,
        evaluator=evaluator,
        process=surroundings.process,
        bad_batches=BadBatches(config, state=state, dealer=dealer, process=surroundings.process),
        stop=surroundings.stop,
        pulse=surroundings.pulse,
    )


def _dealer(config: Config, state: RunState) -> BatchDealer:
    return BatchDealer(
        state.journal,
        state.policy,
        checkpoint_every=config.checkpoint.every,
        last_step=config.run.steps,
        checkpoint_bytes=int(config.run.journal_max_gib * GIB) // (config.checkpoint.keep + 2),
    )


def _sync_planner(config: Config, state: RunState) -> SyncPlanner:
    return SyncPlanner(
        run_epoch=state.run_epoch,
        run_name=config.run.name,
        timeout_s=config.weights.timeout_s,
        tolerance=canary_tolerance(config, on_gpu=False),
        gpu_tolerance=canary_tolerance(config, on_gpu=True),
        cell_size=config.weights.cell_size,
        backend=config.weights.backend,
    )


def _ranks(
    config: Config,
    state: RunState,
    acknowledgements: Acknowledgements,
    dealer: BatchDealer,
    prompts: LeasedPrompts,
    surroundings: Surroundings,
) -> Ranks:
    return Ranks(
        socket=surroundings.trainer_socket,
        state=state,
        acknowledgements=acknowledgements,
        dealer=dealer,
        prompts=prompts,
        metrics=surroundings.metrics,
        last_logged_version=newest_version(Path(config.run.dir) / METRICS_FILE, StepMetrics.kind),
        checkpoints=checkpoint_folder(config),
        keeps_journal=config.run.journal_keep,
        rollouts=surroundings.rollouts,
    )


def canary_tolerance(config: Config, *, on_gpu: bool) -> float:
    """Largest log-prob difference on the canary with which a generator's weights count as the learner's, in nats.

    on_gpu: the learner or the generator computes on a GPU.
    """
    defaults = GPU_CANARY_TOLERANCE if on_gpu else CANARY_TOLERANCE
    return config.weights.canary_tolerance or defaults[config.model.dtype]


def _alarmed_tolerance(config: Config) -> float:
    """The tolerance that alarms are measured against, before anybody has told where it computes."""
    gpu_here = has_gpu()
    devices = (config.learner.device, config.generator.device)
    return canary_tolerance(config, on_gpu=any(is_on_gpu(device, gpu_here=gpu_here) for device in devices))


def largest_received_bytes(config: Config) -> int:
    """Largest frame that a generator of this run has reason to send: a result, or a beat with all its leases.

    transport.max_frame_bytes bounds it for every run; what this run can need is much less, and each byte more is time
    that a hostile frame takes from all others.
    """
    return min(config.transport.max_frame_bytes, max(MIN_RECEIVED_BYTES, 2 * largest_group_bytes(config)))


def _rollout_socket(config: Config) -> ServerSocket:
    transport = config.transport
    addresses = rollout_addresses(transport.address, config.run.dir)
    return ServerSocket(
        first_of_this_host(addresses).text,
        max_frame_bytes=largest_received_bytes(config),
        max_sent_bytes=transport.max_frame_bytes,
        auth=server_auth(transport),
    )


def _trainer_socket(run_dir: Path) -> ServerSocket:
    return ServerSocket(ipc_address(run_dir, "desk.sock"), max_frame_bytes=MAX_FRAME_BYTES)


def _trainer_process(config: Config, config_file: Path, desk_address: str) -> TrainerProcess:
    return TrainerProcess(
        config_file,
        desk_address,
        Path(config.run.dir) / "trainer.log",
        layout=rank_layout(config),
        threads=config.learner.threads,
        max_restarts=config.learner.max_trainer_restarts,
        weights_timeout_s=config.weights.timeout_s,
        weights_host=config.weights.host,
    )


def _rollout_writer(config: Config) -> RolloutWriter:
    """What writes rollouts beside; its process is started when there are some to write."""
    folder = Path(config.run.dir) / ROLLOUTS_FOLDER
    max_bytes = int(config.log.rollouts_max_mib * 2**20)
    return RolloutWriter(WriterSetup(str(folder), config.model.path, max_bytes, config.log.level))


def _say_finished(config: Config, run_dir: Path) -> None:
    log.info(
        "the run %s in %s is finished: all its %d steps are trained, the model is in %s. To train on, raise run.steps; "
        "to begin another run, give another run.name",
        config.run.name,
        run_dir,
        config.run.steps,
        run_dir / "export",
    )

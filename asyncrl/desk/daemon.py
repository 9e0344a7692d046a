"""The learner daemon: restores the run, opens the sockets, starts the trainer, and lets the desk serve.

The process of the daemon *is* the desk: it has no torch, so it listens within a fraction of a second, and it starts
the trainer ranks as children. The kernel takes them along when the desk is killed, so one kill leaves nothing behind.

Order at the start: lock and read the journal → raise the run epoch durably → bind → start the trainer. Nobody can
reach a learner that has not fenced its predecessor.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack
from omegaconf import OmegaConf

from asyncrl.config import Config
from asyncrl.desk.batches import BatchDealer
from asyncrl.desk.counters import Counters
from asyncrl.desk.desk import Desk
from asyncrl.desk.evaluation import Evaluator
from asyncrl.desk.generators import Generators
from asyncrl.desk.intake import Intake
from asyncrl.desk.ranks import Ranks
from asyncrl.desk.trainer_process import TrainerProcess
from asyncrl.desk.versions import Versions
from asyncrl.errors import ConfigError
from asyncrl.host.fingerprints import model_folder_fingerprint, tokenizer_fingerprint
from asyncrl.host.processes import StopSignal, pin_to
from asyncrl.link.addresses import ipc_address
from asyncrl.link.curve_keys import server_auth
from asyncrl.link.session import DeskSessions, Expected
from asyncrl.link.sockets import ServerSocket
from asyncrl.metrics import METRICS_FILE, Metrics, read_records
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.frontier import Frontier
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.pacing import Pacing
from asyncrl.replay.recovery import ReplayPlan, replay_plan
from asyncrl.report.summary import report
from asyncrl.storage.checkpoint_files import find_latest, load_desk_state
from asyncrl.storage.journal import Journal, next_run_epoch
from asyncrl.tasks.base import load_task
from asyncrl.tasks.prompts import PromptSource, load_tokenizer
from asyncrl.weights.plan.planner import SyncPlanner

log = logging.getLogger(__name__)

LOCAL_FRAME_BYTES = 2**31 - 1  # a batch may be large, and the trainer link never leaves the host
CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.35}


def run_learner(config: Config) -> int:
    """Runs one learner to the end of its run, or to a signal. Returns its exit code; raises AsyncRLError otherwise."""
    stop = StopSignal()
    pin_to(config.learner.cpus, "learner.cpus")
    run_dir = Path(config.run.dir)
    journal = Journal.open(run_dir / "journal")
    _refuse_used_folder(config, journal)
    run_epoch = next_run_epoch(run_dir)
    config_file = _write_config(config, run_dir)
    transport = config.transport
    rollout_socket = ServerSocket(
        transport.address, max_frame_bytes=transport.max_frame_bytes, auth=server_auth(transport)
    )
    trainer_socket = ServerSocket(ipc_address(run_dir, "desk.sock"), max_frame_bytes=LOCAL_FRAME_BYTES)
    log.info("listening on %s (run %s, run epoch %d)", rollout_socket.address, config.run.name, run_epoch)
    trainer = TrainerProcess(
        config_file,
        trainer_socket.address,
        run_dir / "trainer.log",
        num_ranks=1,
        threads=config.learner.threads,
        max_restarts=config.learner.max_trainer_restarts,
        weights_timeout_s=config.weights.timeout_s,
    )
    # Started before the slow imports of the tokenizer: both take seconds, and neither needs the other.
    trainer.start()
    metrics = Metrics.open(config, canary_tolerance(config))
    try:
        desk = _make_desk(config, run_epoch, journal, trainer, rollout_socket, trainer_socket, metrics, stop)
        code = desk.run()
    finally:
        trainer.kill()
        rollout_socket.close()
        trainer_socket.close()
        metrics.close()
        journal.close()
    report(run_dir)  # summary.json, the picture, and the last lines on the terminal
    return code


def _make_desk(
    config: Config,
    run_epoch: int,
    journal: Journal,
    trainer: TrainerProcess,
    rollout_socket: ServerSocket,
    trainer_socket: ServerSocket,
    metrics: Metrics,
    stop: StopSignal,
) -> Desk:
    """Joins the desk's sides around an intake that continues where the run stopped."""
    intake, version, evals_done = make_intake(config, run_epoch, journal)
    leases, sessions, account = intake.leases, intake.sessions, intake.account
    planner = SyncPlanner(
        run_epoch=run_epoch,
        run_name=config.run.name,
        timeout_s=config.weights.timeout_s,
        tolerance=canary_tolerance(config),
        cell_size=config.weights.cell_size,
    )
    generators = Generators(
        config, run_epoch=run_epoch, socket=rollout_socket, sessions=sessions, intake=intake, planner=planner
    )
    evaluator = Evaluator(config, len(intake.evals), leases, metrics, intake.sync, evals_done)
    intake.on_eval = evaluator.add

    def desk_state() -> dict[str, Any]:
        return {
            "leases": leases.state(),
            "sessions": sessions.state(),
            "account": account.state(),
            "evals_done": sorted(evaluator.done),
        }

    trainers = Ranks(
        run_epoch=run_epoch,
        version=version,
        socket=trainer_socket,
        intake=intake,
        dealer=BatchDealer(journal, checkpoint_every=config.checkpoint.every, last_step=config.run.steps),
        metrics=metrics,
        last_logged_version=_last_logged_version(Path(config.run.dir)),
        desk_state=desk_state,
        checkpoints=Path(config.run.dir) / "checkpoints",
    )
    weights = Versions(
        planner=planner,
        socket=trainer_socket,
        generators=generators,
        intake=intake,
        evaluator=evaluator,
        metrics=metrics,
        on_first_proof=trainers.begin,
    )
    return Desk(
        config,
        intake=intake,
        generators=generators,
        trainers=trainers,
        weights=weights,
        evaluator=evaluator,
        trainer=trainer,
        stop=stop,
    )


def make_intake(config: Config, run_epoch: int, journal: Journal) -> tuple[Intake, int, set[int]]:
    """Leases, buffer, sessions and prompts, with what the newest checkpoint and the journal after it hold.

    Returns the version of that checkpoint (0 without one) and the versions that were evaluated by then, too.
    """
    pacing = Pacing(config.learner.groups_per_step, config.staleness.max_age, config.run.steps)
    leases = LeaseBook(pacing, config.generator.lease_timeout_s, run_epoch)
    buffer = ReplayBuffer(pacing, config.staleness.over_age)
    account = Counters()
    sessions = make_sessions(config, run_epoch)
    version, newest_version, evals_done = _restore(config, journal, leases, buffer, account, sessions)
    task = load_task(config.task.path, config.task.args)
    prompts = PromptSource(task, load_tokenizer(config.model.path), config.run.seed, _max_prompt_tokens(config))
    intake = Intake(
        config=config,
        vocab_size=_vocab_size(config.model.path),
        prompts=prompts,
        evals=prompts.evals(config.eval.prompts) if config.eval.prompts else [],
        leases=leases,
        buffer=buffer,
        journal=journal,
        account=account,
        sessions=sessions,
        # Generators are back within a second and bring what they have of the version reached before; the trainer that
        # trains up to it again takes longer to start.
        newest_version=newest_version,
        proven_before=newest_version if run_epoch > 1 else -1,
    )
    return intake, version, evals_done


def make_sessions(config: Config, run_epoch: int) -> DeskSessions:
    """The desk's side of all sessions, which expects generators of the same model, tokenizer and task."""
    return DeskSessions(
        run_epoch=run_epoch,
        run_name=config.run.name,
        expected=Expected(
            model_folder_fingerprint(config.model.path),
            tokenizer_fingerprint(Path(config.model.path)),
            config.task.path,
        ),
        credit_bytes=config.transport.credit_bytes,
        max_frame_bytes=config.transport.max_frame_bytes,
    )


def _restore(
    config: Config, journal: Journal, leases: LeaseBook, buffer: ReplayBuffer, account: Counters, sessions: DeskSessions
) -> tuple[int, int, set[int]]:
    """Versions of the newest checkpoint and of the journal's end, and the evaluations; the parts continue there."""
    manifest = find_latest(Path(config.run.dir) / "checkpoints")
    state: dict[str, Any] = {}
    version = 0
    if manifest is not None:
        version = manifest.version
        state = msgpack.unpackb(load_desk_state(manifest), strict_map_key=False)
    settled = Frontier.from_state(state["leases"]["settled"]) if state else Frontier()
    plan = replay_plan(version, settled, journal.read_all())
    now = time.monotonic()
    if state:
        account.restore(state["account"])
        sessions.restore(state["sessions"], now=now)
    leases.restore(
        state.get("leases"),
        trained=plan.trained,
        accepted=[group.key for group in plan.buffered],
        given_up=plan.given_up,
        filtered=plan.filtered,
    )
    for group in plan.buffered:
        buffer.add(group)
    for (generator_id, incarnation), seqs in plan.seen.items():
        for seq in sorted(seqs):
            sessions.replay(generator_id, incarnation, seq, now=now)
    _say_restored(version, plan, journal)
    return version, version + len(plan.steps), set(state.get("evals_done", []))


def _say_restored(version: int, plan: ReplayPlan, journal: Journal) -> None:
    if journal.torn_bytes:
        log.info("cut %d bytes of an unfinished write off the journal; none was acknowledged", journal.torn_bytes)
    for damage in journal.damage:
        log.error("journal is damaged at %s: %d bytes are skipped", damage.location, damage.num_bytes)
    if plan.broken_at is not None:
        log.error("the batch of version %d cannot be read back: training goes on with other batches", plan.broken_at)
    if version or plan.steps or plan.buffered:
        log.info(
            "resuming: checkpoint at version %d, %d steps to train again, %d groups in the buffer",
            version,
            len(plan.steps),
            len(plan.buffered),
        )


def canary_tolerance(config: Config) -> float:
    """Largest log-prob difference on the canary with which a generator's weights count as the learner's, in nats."""
    return config.weights.canary_tolerance or CANARY_TOLERANCE[config.model.dtype]


def _refuse_used_folder(config: Config, journal: Journal) -> None:
    used = journal.num_bytes > 0 and any(True for _ in journal.read_all())
    if config.checkpoint.resume == "never" and (used or find_latest(Path(config.run.dir) / "checkpoints")):
        raise ConfigError(
            f"run.dir={config.run.dir} holds an earlier run and checkpoint.resume=never; "
            "use checkpoint.resume=auto to go on with it, or another run.dir (or run.name)"
        )


def _write_config(config: Config, run_dir: Path) -> Path:
    """The resolved configuration, for the trainer and for whoever reads the run later."""
    path = run_dir / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    return path


def _max_prompt_tokens(config: Config) -> int:
    return config.model.max_length - config.sampling.max_new_tokens


def _vocab_size(model_path: str) -> int:
    return int(json.loads((Path(model_path) / "config.json").read_text())["vocab_size"])


def _last_logged_version(run_dir: Path) -> int:
    path = run_dir / METRICS_FILE
    if not path.exists():
        return 0
    records, _ = read_records(path)
    return max((record["version"] for record in records if record["kind"] == "step"), default=0)

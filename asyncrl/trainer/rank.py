"""One trainer rank: a process that gets batches from the desk, makes optimizer steps, and publishes each new policy.

    asks for the batch of version v → step → version v+1 → snapshot for the publisher → checkpoint if told → asks again

Where there are several, rank 0 is the one that does so, and the others follow it: see `trainer.world`.

Started by the desk (`desk.trainer_process`) as ``python -m asyncrl.trainer.rank CONFIG DESK_ADDRESS``. The desk
may restart it at any time: it comes back with the newest checkpoint and is given the steps after it from the journal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from asyncrl.config import Config
from asyncrl.config.loading import load_config
from asyncrl.errors import AsyncRLError, CheckpointError, ConfigError, PeerUnreachable, RankLost, UserError
from asyncrl.host.processes import die_with_parent, leave, pin_to, process_age_s
from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.link.schema.message_base import Message
from asyncrl.link.trainer_link import LAST_WORDS, TrainerLink
from asyncrl.link.trainer_messages import (
    Batch,
    BatchRequest,
    CheckpointDone,
    StepDone,
    StepRollouts,
    TrainerHello,
    TrainerStop,
    TrainerWelcome,
)
from asyncrl.link.weight_records import Placement
from asyncrl.metrics.ledger import LearnerActivity, Ledger, in_words
from asyncrl.metrics.types import REWARD_PART
from asyncrl.report.rollouts.choice import is_due
from asyncrl.storage.checkpoint_files import is_empty, unreadable
from asyncrl.trainer.agreement import CHECK_EVERY, check_agreement, check_start
from asyncrl.trainer.checkpoint import SAVE_TIMEOUT_S, load_checkpoint
from asyncrl.trainer.checkpoint_writer import CheckpointPeers, CheckpointWriter
from asyncrl.trainer.engines.base import Engines
from asyncrl.trainer.engines.fsdp import load_fsdp_engines
from asyncrl.trainer.engines.single import load_engines
from asyncrl.trainer.step import StepRunner
from asyncrl.trainer.world import Order, RankPlace, World, is_loss
from asyncrl.types import FinishReason, Group, means_of_parts
from asyncrl.weights.bytes.memory import placement
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.rendezvous import first_line
from asyncrl.weights.publisher import Publisher
from asyncrl.weights.relay import Relay
from asyncrl.weights.shard_publisher import ShardPublisher

log = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0  # a request that was lost is repeated after this long
CANARY_LENGTH = 32
STOP_TIMEOUT_S = 10.0  # of a publisher
CHECKPOINT_DEADLINE_S = 1800.0  # how long a rank may write its part of a checkpoint while the others wait for it


class Rank:
    """One rank: the steps and its part of checkpoints; on rank 0 the link to the desk and the publisher as well.

    ledger  where its time goes; only rank 0 keeps it up to date
    """

    def __init__(self, config: Config, desk_address: str, device: torch.device, world: World, ledger: Ledger) -> None:
        """Loads the initial model, or the newest checkpoint of this run.

        Raises ModelError, ConfigError and CheckpointError for what the user must put right.
        """
        self.config = config
        self.desk_address = desk_address
        self.world = world
        self.ledger = ledger
        self.run_dir = Path(config.run.dir)
        torch.manual_seed(config.run.seed)
        engines = _load_engines(config, device, world)
        self.actor = engines.actor
        self.runner = StepRunner(engines, config, world=world)
        checkpoints = self.run_dir / "checkpoints"
        self.peers = CheckpointPeers(world.new_group(CHECKPOINT_DEADLINE_S))
        restored = load_checkpoint(checkpoints, self.runner, peers=self.peers)
        if restored is None and not is_empty(checkpoints):
            raise CheckpointError(unreadable(checkpoints))
        if restored is not None:
            log.info("resumed from %s at version %d", restored.path, self.runner.version)
        self.desk_state = b"" if restored is None else restored.desk_state
        length = min(CANARY_LENGTH, config.model.max_length)
        self.canary = self.actor.sample_sequences(config.weights.canary_sequences, length, config.run.seed)
        self.checkpoints = CheckpointWriter(checkpoints, self.runner, keep=config.checkpoint.keep, peers=self.peers)
        self._checkpoint_due = False
        self.publisher: Publisher | None = None  # of rank 0
        self.shard_publisher: ShardPublisher | None = None  # of every other rank
        self.run_epoch = 0
        check_agreement(world, self.runner)
        world.hurry()

    def run(self) -> int:
        """Trains until the desk says stop. Returns the exit code."""
        return self._lead() if self.world.rank == 0 else self._follow()

    def _lead(self) -> int:
        self.link = TrainerLink(self.desk_address)
        welcome = self._greet()
        self.run_epoch = welcome.run_epoch
        self.publisher = self._start_publisher(welcome.replay_to)
        self.ledger.switch(LearnerActivity.OTHER)
        self.world.meeting = lambda: self.ledger.during(LearnerActivity.RANKS)
        while True:
            with self.ledger.during(LearnerActivity.DATA):
                answer = self._ask(BatchRequest(0, self.runner.version))
            match answer:
                case Batch():
                    self._train(answer)
                case TrainerStop():
                    return self._finish(answer)
                case _:
                    log.warning("unexpected %s from the desk", type(answer).__name__)

    # -- all ranks -------------------------------------------------------------------------------------------------

    def _follow(self) -> int:
        """Does what rank 0 does, as far as it takes all ranks."""
        while True:
            order, number = self.world.listen()
            if order is Order.STEP:
                assert number == self.runner.version, (number, self.runner.version)
                self.runner.follow()
            elif order is Order.OPEN_PUBLISHER:
                invitation = self.world.scatter(None).decode()
                self.shard_publisher = ShardPublisher(invitation, self._snapshot_buffer())
                self.shard_publisher.start()
            elif order is Order.PUBLISH:
                self._publish_shard(number)
            elif order is Order.STOP:
                if self.shard_publisher is not None:
                    self.shard_publisher.stop(STOP_TIMEOUT_S)
                self.checkpoints.finished(SAVE_TIMEOUT_S)
                self.world.close()
                return 0
            else:
                self._take_part(order)

    def _all(self, order: Order) -> None:
        """Rank 0: tells the others to take part in something, and does so itself."""
        self.world.tell(order)
        self._take_part(order)

    def _take_part(self, order: Order) -> None:
        match order:
            case Order.CHECKPOINT:
                self.checkpoints.begin(run_epoch=self.run_epoch, desk_state=self.desk_state)
            case Order.EXPORT:
                try:
                    self.actor.export(self.run_dir / "export", Path(self.config.model.path))
                finally:
                    self.peers.tell(None)  # rank 0 makes files durable longer than a rank listens for an order
            case Order.CHECK:
                check_agreement(self.world, self.runner)
            case _:
                raise AssertionError(f"{order!r} is no order to take part in")

    # -- start -----------------------------------------------------------------------------------------------------

    def _greet(self) -> TrainerWelcome:
        # One to the desk, however many there are: it deals whole batches.
        hello = TrainerHello(0, 1, self.runner.version, os.getpid(), self._placement())
        answer = self._ask(hello)
        if not isinstance(answer, TrainerWelcome):
            raise AsyncRLError(f"the desk answered a trainer's hello with {type(answer).__name__}")
        return answer

    def _placement(self) -> Placement:
        """Where this host's ranks compute: each on a GPU of its own, or all on the CPU."""
        device = self.actor.device
        if device.type != "cuda":
            return placement([device])
        count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return placement([torch.device("cuda", index) for index in range(count)])

    def _start_publisher(self, replay_to: int) -> Publisher:
        """Publishes the version there is, unless steps up to `replay_to` are to be made again first."""
        config, relay = self.config, None
        if self.world.size > 1:
            relay = Relay(config.weights.host, self.world.size)
            self.world.tell(Order.OPEN_PUBLISHER)
            self.world.scatter([relay.invitation.encode()] * self.world.size)
        publisher = Publisher(
            self.desk_address,
            self._snapshot_buffer(),
            self.canary,
            host=config.weights.host,
            port=config.weights.port,
            relay=relay,
        )
        publisher.start()
        if self.runner.version >= replay_to:
            self._publish(publisher)
        return publisher

    def _publish(self, publisher: Publisher) -> None:
        """The policy as it is now: all ranks score the canary, then each copies what it holds."""
        with self.ledger.during(LearnerActivity.SNAPSHOT):
            self.world.tell(Order.PUBLISH, publisher.begin())
            publisher.publish(self.runner.version, self.actor.score(self.canary))

    def _publish_shard(self, slot: int) -> None:
        assert self.shard_publisher is not None, "rank 0 opens the publisher first"
        self._check_publisher()
        self.actor.score(self.canary)
        self.shard_publisher.publish(self.runner.version, slot)

    def _snapshot_buffer(self) -> SnapshotBuffer:
        source = self.actor.tensors()
        return SnapshotBuffer(
            source.named,
            self.config.weights.bucket_bytes,
            # Where generators compute in bfloat16, float32 would double the bytes for nothing.
            torch.bfloat16 if self.config.model.dtype == "bfloat16" else None,
            adapted=source.adapted,
            patch=source.patch,
            # On a GPU a generator may compute on the same one, and then takes the bytes from here.
            shared=self.config.weights.backend == "ipc"
            or (self.config.weights.backend == "auto" and self.actor.device.type == "cuda"),
            sender=self.world.rank,
            senders=self.world.size,
            device=self.actor.device,
        )

    # -- a step ----------------------------------------------------------------------------------------------------

    def _train(self, batch: Batch) -> None:
        if batch.version != self.runner.version:
            log.warning("batch for version %d ignored, at %d", batch.version, self.runner.version)
            return
        started = time.monotonic()
        with self.ledger.during(LearnerActivity.MESSAGES):
            groups = [result_to_group(decode_body(GroupResult, body)) for body in batch.groups]
        with self.ledger.during(LearnerActivity.COMPUTE):
            self.world.tell(Order.STEP, self.runner.version)
            result = self.runner.step(groups, keep=self._num_kept(batch.version + 1))
        step_s = time.monotonic() - started
        metrics = result.metrics | result.times | outcome_metrics(groups)
        self.desk_state = batch.desk_state
        if self.publisher and batch.publish:
            self._check_publisher()
            began = time.monotonic()
            self._publish(self.publisher)
            metrics["publish_blocked_ms"] = (time.monotonic() - began) * 1e3
        with self.ledger.during(LearnerActivity.MESSAGES):
            if result.kept:
                ordinals = [kept.ordinal for kept in result.kept]
                self.link.send(StepRollouts(result.version, ordinals, [kept.to_bytes() for kept in result.kept]))
            self.link.send(StepDone(result.version, metrics, step_s, self.ledger.seconds()))
        if result.version % CHECK_EVERY == 0:
            self._all(Order.CHECK)
        self._checkpoint(batch.checkpoint)

    def _num_kept(self, step: int) -> int:
        """How many rollouts of the step that makes version `step` are written."""
        log_config = self.config.log
        return log_config.rollouts_per_step if is_due(step, self.config.run.steps, log_config.rollouts_every) else 0

    def _check_publisher(self) -> None:
        """Raises AsyncRLError when the publisher's thread has died: without it no generator gets a new policy.

        RankLost where another rank is to blame.
        """
        publisher = self.publisher or self.shard_publisher
        if publisher is not None and publisher.crash is not None:
            lost = isinstance(publisher.crash, RankLost)
            raise (RankLost if lost else AsyncRLError)(f"the publisher thread died: {publisher.crash!r}")

    def _checkpoint(self, due: bool) -> None:
        """Begins a checkpoint that is due, or was; it is written beside training. One at a time: the next one waits."""
        self._report_checkpoint()
        self._checkpoint_due |= due
        # Steps that are made again come without the desk's state, which a checkpoint must have.
        if not (self._checkpoint_due and self.desk_state):
            return
        if self.checkpoints.is_busy:
            log.info("version %d is not saved yet: the checkpoint before is still being written", self.runner.version)
            return
        self._checkpoint_due = False
        with self.ledger.during(LearnerActivity.CHECKPOINT):
            self._all(Order.CHECKPOINT)

    def _report_checkpoint(self, timeout_s: float = 0.0) -> str:
        """Tells the desk of a checkpoint that is durable, or failed: training then goes on with the older ones intact.

        Returns what failed. With timeout_s, waits that long for one that is being written.
        """
        with self.world.others_wait() if timeout_s else contextlib.nullcontext():
            saved = self.checkpoints.finished(timeout_s)
        if saved is None:
            return f"a checkpoint is not written after {timeout_s:.0f} s" if self.checkpoints.is_busy else ""
        if saved.error:
            log.error("%s", saved.error)
        else:
            log.info(
                "version %d is saved after %.1f s, training stood still for %.2f s",
                saved.version, saved.seconds, saved.blocked_s,
            )  # fmt: skip
        self.link.send(CheckpointDone(saved.version, saved.path, saved.error, saved.seconds))
        return saved.error

    # -- end -------------------------------------------------------------------------------------------------------

    def _finish(self, stop: TrainerStop) -> int:
        """Saves and exports what the desk asked for. Returns exit code 0.

        Raises CheckpointError when something could not be saved: there is no later step to try again.
        """
        if self.publisher:
            self.publisher.stop(STOP_TIMEOUT_S)
        try:
            with self.ledger.during(LearnerActivity.CHECKPOINT):
                problem = self._report_checkpoint(SAVE_TIMEOUT_S)
                if stop.checkpoint and self.desk_state and not self.checkpoints.is_busy:
                    self._all(Order.CHECKPOINT)
                    problem = self._report_checkpoint(SAVE_TIMEOUT_S)
            if stop.export:
                self._all(Order.EXPORT)
            self.world.tell(Order.STOP)
            self.world.close()
        finally:
            self.link.close(flush_s=5.0)
            spent = self.ledger.seconds()
            log.info("the time of this trainer, %.2f s: %s", sum(spent.values()), in_words(spent))
        if problem:
            raise CheckpointError(problem)
        return 0

    def _ask(self, request: Message) -> Message:
        """Sends `request` until an answer comes, and returns that.

        There is no end to the wait for a batch: the desk knows and says what it waits for, and takes this process
        with it when it dies.
        """
        while True:
            self.world.tell(Order.WAIT)
            self.link.send(request)
            if (message := self.link.receive(ASK_AGAIN_S)) is not None:
                return message
            self._check_publisher()
            self._report_checkpoint()


def outcome_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts of a batch brought: truncated_share, and each reward part's mean over those that have it."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    parts = means_of_parts(rollout.reward_parts for rollout in rollouts)
    figures = {f"{REWARD_PART}{name}": value for name, value in parts.items()}
    truncated = sum(rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts)
    return figures | {"truncated_share": truncated / len(rollouts)}


def _load_engines(config: Config, device: torch.device, world: World) -> Engines:
    learner = config.learner
    if learner.engine == "fsdp" or (learner.engine == "auto" and (world.size > 1 or device.type == "cuda")):
        return load_fsdp_engines(config, device, world)
    if learner.activation_checkpointing != "none" or learner.offload_optimizer:
        raise ConfigError(
            "learner.activation_checkpointing and learner.offload_optimizer need learner.engine=fsdp; with one process "
            "on a CPU learner.engine=auto is single"
        )
    return load_engines(config, device)


def _device(name: str, local_rank: int) -> torch.device:
    """The device of this rank; on a GPU also torch's own choice of it, for streams, events and libraries."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"learner.ranks: rank {local_rank} of this host has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; lower learner.ranks, or show more by CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _be_deterministic() -> None:
    """Before the first call of CUDA. Kernels that have no deterministic form raise from now on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # it would write every buffer once more


def main() -> int:
    """Entry point of a rank's process."""
    die_with_parent()
    return run_rank(*sys.argv[1:3], age_s=process_age_s())


def run_rank(config_file: str, desk_address: str, *, age_s: float = 0.0) -> int:
    """Runs the rank that the environment says this process is, since age_s seconds; returns its exit code."""
    ledger = Ledger(LearnerActivity.START, age_s=age_s)
    config = load_config(config_file, [])
    place = RankPlace.from_environment()
    who = f"rank {place.rank} " if place.size > 1 else ""
    form = f"%(asctime)s {who}%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=config.log.level.upper(), format=form, stream=sys.stderr)
    pin_to(config.learner.cpus, "learner.cpus")
    torch.set_num_threads(config.learner.threads)
    if config.learner.deterministic:
        _be_deterministic()
    world = World.alone()
    try:
        device = _device(config.learner.device, place.local_rank)
        world = World.form(place, device)
        check_start(world, config)
        world.share_sequences(config.learner.sequence_parallel)
        world.hold_replicas(config.learner.replicas)
        return Rank(config, desk_address, device, world, ledger).run()
    except (UserError, CheckpointError, PeerUnreachable) as error:
        # Starting again would end the same way: the desk tells the user instead.
        print(f"{LAST_WORDS}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (RankLost, RuntimeError) as error:
        if not is_loss(error):
            raise
        silent = world.silent_ranks()
        no_sign = f"; no sign of life of rank {', '.join(map(str, silent))}" if silent else ""
        log.error("another trainer rank is lost%s: %s", no_sign, first_line(error))
        return RankLost.exit_code


if __name__ == "__main__":
    leave(main())

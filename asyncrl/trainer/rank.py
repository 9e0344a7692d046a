"""One trainer rank: a process that gets batches from the desk, makes optimizer steps, and publishes each new policy.

    asks for the batch of version v → step → version v+1 → snapshot for the publisher → checkpoint if told → asks again

Started by the desk (`desk.trainer_process`) as ``python -m asyncrl.trainer.rank CONFIG DESK_ADDRESS``. The desk
may restart it at any time: it comes back with the newest checkpoint and is given the steps after it from the journal.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from asyncrl.config import Config
from asyncrl.config.host_checks import weight_backend
from asyncrl.config.loading import load_config
from asyncrl.errors import AsyncRLError, CheckpointError, UserError
from asyncrl.host.processes import die_with_parent, leave, pin_to
from asyncrl.link.codec import decode_body
from asyncrl.link.messages import (
    Batch,
    BatchRequest,
    CheckpointDone,
    GroupResult,
    Message,
    StepDone,
    TrainerHello,
    TrainerStop,
    TrainerWelcome,
)
from asyncrl.link.rollouts import result_to_group
from asyncrl.link.trainer_link import LAST_WORDS, TrainerLink
from asyncrl.metrics.types import REWARD_PART
from asyncrl.trainer.canary import SnapshotScorer
from asyncrl.trainer.checkpoint import export_model, load_checkpoint, save_checkpoint
from asyncrl.trainer.critic import load_critic
from asyncrl.trainer.engines.policy import load_policy
from asyncrl.trainer.step import PolicyTrainer
from asyncrl.types import FinishReason, Group
from asyncrl.weights.channels.channel import SnapshotBuffer
from asyncrl.weights.publisher import Publisher

log = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0  # a request that was lost is repeated after this long
CANARY_LENGTH = 32


class Trainer:
    """One rank. Rank 0 also publishes and checkpoints."""

    def __init__(self, config: Config, desk_address: str, rank: int, world_size: int) -> None:
        self.config = config
        self.desk_address = desk_address
        self.rank = rank
        self.world_size = world_size
        self.device = _device(config.learner.device)
        self.run_dir = Path(config.run.dir)
        self.link = TrainerLink(desk_address)
        self.policy: PolicyTrainer
        self.publisher: Publisher | None = None
        self.run_epoch = 0
        self.replay_to = 0
        self.desk_state = b""

    def run(self) -> int:
        """Trains until the desk says stop. Returns the exit code."""
        self._load()
        self._greet()
        self._start_publisher()
        while True:
            message, idle_s = self._ask(BatchRequest(self.rank, self.policy.version))
            match message:
                case Batch():
                    self._train(message, idle_s)
                case TrainerStop():
                    return self._finish(message)
                case _:
                    log.warning("unexpected %s from the desk", type(message).__name__)

    # -- start -----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """The initial model, or the newest checkpoint of this run."""
        config = self.config
        torch.manual_seed(config.run.seed)
        policy = load_policy(
            config.model,
            self.device,
            update=config.update,
            seed=config.run.seed,
            with_reference=config.algorithm.kl_coef > 0,
        )
        self.policy = PolicyTrainer(policy, config, critic=load_critic(config, policy))
        restored = load_checkpoint(self.run_dir / "checkpoints", self.policy)
        if restored is not None:
            self.desk_state = restored.desk_state
            log.info("resumed from %s at version %d", restored.path, self.policy.version)

    def _greet(self) -> None:
        hello = TrainerHello(self.rank, self.world_size, self.policy.version, os.getpid())
        message, _ = self._ask(hello)
        if not isinstance(message, TrainerWelcome):
            raise AsyncRLError(f"the desk answered a trainer's hello with {type(message).__name__}")
        self.run_epoch, self.replay_to = message.run_epoch, message.replay_to

    def _start_publisher(self) -> None:
        if self.rank != 0:
            return
        weights = self.config.weights
        source = self.policy.policy.sync_source()
        # The engine computes in bfloat16 then: sending the float32 masters would double the bytes for nothing.
        wire_dtype = torch.bfloat16 if self.config.model.dtype == "bfloat16" else None
        buffer = SnapshotBuffer(
            source.named,
            weights.bucket_bytes,
            wire_dtype,
            adapted=source.adapted,
            patch=source.patch,
            shared=weights.backend == "ipc",
        )
        length = min(CANARY_LENGTH, self.config.model.max_length)
        canary = self.policy.policy.sample_sequences(weights.canary_sequences, length, self.config.run.seed)
        self.publisher = Publisher(
            self.desk_address,
            buffer,
            canary,
            SnapshotScorer(self.policy.policy),
            host=weights.host,
            backend=weight_backend(self.config, gpu_here=self.device.type == "cuda"),
        )
        self.publisher.start()
        if self.policy.version >= self.replay_to:
            self.publisher.publish(self.policy.version)

    # -- a step ----------------------------------------------------------------------------------------------------

    def _train(self, batch: Batch, idle_s: float) -> None:
        if batch.version != self.policy.version:
            log.warning("batch for version %d ignored, at %d", batch.version, self.policy.version)
            return
        started = time.monotonic()
        groups = [result_to_group(decode_body(GroupResult, body)) for body in batch.groups]
        result = self.policy.step(groups)
        step_s = time.monotonic() - started
        metrics = result.metrics | outcome_metrics(groups)
        self.desk_state = batch.desk_state
        if self.publisher and batch.publish:
            self._check_publisher()
            metrics["publish_blocked_ms"] = self.publisher.publish(self.policy.version)
        self.link.send(StepDone(self.policy.version, metrics, step_s, idle_s))
        if batch.checkpoint:
            self._checkpoint()

    def _check_publisher(self) -> None:
        assert self.publisher is not None
        if self.publisher.crash is not None:
            raise AsyncRLError(f"the publisher thread died: {self.publisher.crash!r}") from self.publisher.crash

    def _checkpoint(self) -> str:
        """Saves. Returns what failed: it is reported, and training goes on with the older checkpoints intact."""
        if self.rank != 0:
            return ""
        started, path, error = time.monotonic(), "", ""
        try:
            path = str(
                save_checkpoint(
                    self.run_dir / "checkpoints",
                    self.policy,
                    run_epoch=self.run_epoch,
                    desk_state=self.desk_state,
                    keep=self.config.checkpoint.keep,
                )
            )
        except CheckpointError as failure:
            error = str(failure)
            log.error("%s", failure)
        self.link.send(CheckpointDone(self.policy.version, path, error, time.monotonic() - started))
        return error

    # -- end -------------------------------------------------------------------------------------------------------

    def _finish(self, stop: TrainerStop) -> int:
        """Returns 0. Raises CheckpointError when something could not be saved: there is no later step to try again."""
        if self.publisher:
            self.publisher.stop(timeout_s=10.0)
        try:
            problem = self._checkpoint() if stop.checkpoint and self.desk_state else ""
            if stop.export and self.rank == 0:
                export_model(self.policy.policy, Path(self.config.model.path), self.run_dir / "export")
        finally:
            self.link.close(flush_s=5.0)
        if problem:
            raise CheckpointError(problem)
        return 0

    def _ask(self, request: Message) -> tuple[Message, float]:
        """Sends `request` until an answer comes; returns it and the seconds waited.

        There is no end to the wait for a batch: the desk knows and says what it waits for, and takes this process
        with it when it dies.
        """
        started = time.monotonic()
        while True:
            self.link.send(request)
            if (message := self.link.receive(ASK_AGAIN_S)) is not None:
                return message, time.monotonic() - started
            if self.publisher:
                self._check_publisher()


def outcome_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts of a batch brought: truncated_share, and the mean of each reward part as `reward_part/NAME`."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    names = sorted({name for rollout in rollouts for name in rollout.reward_parts})
    figures = {
        f"{REWARD_PART}{name}": sum(rollout.reward_parts.get(name, 0.0) for rollout in rollouts) / len(rollouts)
        for name in names
    }
    truncated = sum(rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts)
    return figures | {"truncated_share": truncated / len(rollouts)}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def main() -> int:
    """Entry point of a rank's process."""
    die_with_parent()
    config_file, desk_address = sys.argv[1:3]
    config = load_config(config_file, [])
    logging.basicConfig(
        level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    pin_to(config.learner.cpus, "learner.cpus")
    torch.set_num_threads(config.learner.threads)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(config, desk_address, rank, world_size)
    try:
        return trainer.run()
    except (UserError, CheckpointError) as error:
        # Starting again would end the same way: the desk tells the user instead.
        print(f"{LAST_WORDS}{error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    leave(main())

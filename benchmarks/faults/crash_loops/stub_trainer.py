"""A trainer without torch: its policy is a chain of hashes over the batches that it was dealt.

    python -m benchmarks.faults.crash_loops.stub_trainer FOLDER DESK_ADDRESS      (started by the stub learner)

Two trainers that were dealt the same batches have the same chain; any other batch, or order, shows in all that follow.
Checkpoints are real ones and hold the chain. Each step is written down before it is reported.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

from asyncrl.host.processes import die_with_parent, leave
from asyncrl.link import trainer_messages as messages
from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult, Message
from asyncrl.link.trainer_link import TrainerLink
from asyncrl.storage.checkpoint_files import find_latest, load_desk_state, write_checkpoint
from benchmarks.faults.crash_loops.ledger import MadeStep, TrainerLedger, sha
from benchmarks.faults.crash_loops.settings import config_of, settings_of
from benchmarks.faults.crash_loops.stub_weights import canary_row, canary_tokens, manifest_of

CANARY = (3, 1, 4, 1, 5)
CHAIN_FILE = "chain"
FIGURES = {"reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0.0}
ASK_AGAIN_S = 5.0


class StubTrainer:
    """Rank and publisher in one thread and on one socket."""

    def __init__(self, folder: Path, address: str) -> None:
        self.config = config_of(folder)
        self.checkpoints = Path(self.config.run.dir) / "checkpoints"
        self.step_s = settings_of(folder).step_s
        self.ledger = TrainerLedger(folder / "ledgers" / "steps.trainer")
        self.link = TrainerLink(address)
        self.version, self.chain, self.desk_state, self.run_epoch = 0, b"initial", b"", 0
        manifest = find_latest(self.checkpoints)
        if manifest is not None:
            self.version, self.desk_state = manifest.version, load_desk_state(manifest)
            self.chain = (manifest.path / CHAIN_FILE).read_bytes()
        self._fresh: tuple[int, bytes] | None = None
        self._offer: messages.SnapshotReady | None = None
        self._offered = self.version, self.chain
        self._wanted = True

    def run(self) -> int:
        """Trains until the desk says stop."""
        request: Message = messages.TrainerHello(0, 1, self.version, 1)
        self.link.send(request)
        while True:
            message = self.link.receive(ASK_AGAIN_S)
            match message:
                case None:
                    self.link.send(request)
                    continue
                case messages.TrainerWelcome():
                    self.run_epoch = message.run_epoch
                    if self.version >= message.replay_to:
                        self._publish()
                case messages.Batch() if message.version == self.version:
                    self._train(message)
                case messages.TrainerStop():
                    if message.checkpoint and self.desk_state:
                        self._save()
                    self.link.close(flush_s=5.0)
                    return 0
                case _:
                    self._sync(message)
                    continue
            request = messages.BatchRequest(0, self.version)
            self.link.send(request)

    def _train(self, batch: messages.Batch) -> None:
        time.sleep(self.step_s)
        groups = [decode_body(GroupResult, body) for body in batch.groups]
        self.chain = hashlib.sha256(self.chain + b"".join(batch.groups)).digest()
        self.version += 1
        self.desk_state = batch.desk_state
        pairs = zip(groups, batch.groups, strict=True)
        step = tuple((group.ordinal, group.attempt, sha(body)) for group, body in pairs)
        self.ledger.made(MadeStep(self.version, self.chain.hex(), step))
        if batch.publish:
            self._publish()
        self.link.send(messages.StepDone(self.version, FIGURES, self.step_s, {}))
        if batch.checkpoint:
            self._save()

    def _write_chain(self, folder: Path) -> None:
        (folder / CHAIN_FILE).write_bytes(self.chain)

    def _save(self) -> None:
        started = time.monotonic()
        manifest = write_checkpoint(
            self.checkpoints,
            self.version,
            self._write_chain,
            run_epoch=self.run_epoch,
            desk_state=self.desk_state,
            keep=self.config.checkpoint.keep,
        )
        seconds = time.monotonic() - started
        self.link.send(messages.CheckpointDone(self.version, str(manifest.path), "", seconds))

    # -- the publisher

    def _publish(self) -> None:
        self._fresh = self.version, self.chain
        self._offer_fresh()

    def _offer_fresh(self) -> None:
        if not self._wanted or self._fresh is None:
            return
        self._offered, self._fresh, self._wanted = self._fresh, None, False
        version, chain = self._offered
        manifest = manifest_of(version, chain)
        row = canary_row(manifest.digests, CANARY).tobytes()
        self._offer = messages.SnapshotReady(version, manifest, [canary_tokens()], [row], 0.1)
        self.link.send(self._offer)

    def _sync(self, message: Message) -> None:
        match message:
            case messages.SnapshotWanted():
                if message.version == self._offered[0]:
                    self._wanted = True
                    self._offer_fresh()
                elif self._offer is not None and message.version < self._offer.version:
                    self.link.send(self._offer)
            case messages.OpenChannel():
                answer = messages.ChannelReady(message.channel_epoch, "127.0.0.1", 1, "", "gloo", self._offered[0])
                self.link.send(answer)
            case messages.Broadcast():
                done = messages.BroadcastDone(
                    message.version, message.attempt, message.channel_epoch, "", 0.1, 128, 128
                )
                self.link.send(done)


if __name__ == "__main__":
    die_with_parent()
    leave(StubTrainer(Path(sys.argv[1]), sys.argv[2]).run())

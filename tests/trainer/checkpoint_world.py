"""One of three processes that save and load checkpoints as worlds of one, two and three ranks, one after the other.

python -m tests.trainer.checkpoint_world RANK FOLDER METHOD PORT...    (a port for each world)

What each saw goes to FOLDER/seen.RANK.json.
"""

import json
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from asyncrl.config import Config, ModelConfig, UpdateConfig
from asyncrl.trainer import checkpoint_writer
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.checkpoint_writer import CheckpointPeers, CheckpointWriter
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.fsdp import fsdp_engines_for
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.engines.policy import load_policy
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.step import StepRunner
from asyncrl.trainer.world import RankPlace, World
from asyncrl.weights.bytes.digest import digest
from tests.trainer.tiny import random_groups, tiny_model

CPU = torch.device("cpu")
STEPS = 3  # before the checkpoint; two more follow


def config_of(method: str, model: Path) -> Config:
    config = Config()
    config.model = ModelConfig(path=str(model))
    config.learner.lr = 1e-2
    if method == "lora":
        config.update = UpdateConfig(what="lora", lora_rank=4, lora_targets=["q_proj", "down_proj"])
    if method == "ppo":
        config.algorithm.advantage, config.critic.trunk = "gae", "own"
    return config


def make_runner(config: Config, world: World, seed: int = 0) -> StepRunner:
    policy = load_policy(config.model, CPU, update=config.update, seed=seed)
    critic = None
    if config.algorithm.advantage == "gae":
        critic = Critic(tiny_model(seed=seed + 5).model, 16, dtype="float32", device=CPU)
    if world.size == 1:
        return StepRunner(engines_for(policy, config, critic=critic), config)
    return StepRunner(fsdp_engines_for(policy, config, CPU, world, critic=critic), config, world=world)


class Phase:
    """One world, with whatever this rank does in it."""

    def __init__(self, rank: int, size: int, port: int, config: Config, *, seed: int = 0) -> None:
        place = RankPlace(rank=rank, size=size, port=port) if size > 1 else RankPlace()
        self.world = World.form(place, CPU)
        self.peers = CheckpointPeers(self.world.new_group(60.0))
        self.runner = make_runner(config, self.world, seed)

    def step(self, seed: int) -> None:
        if self.world.rank == 0:
            self.runner.step(random_groups(3, 4, seed=seed))
        else:
            self.runner.follow()

    def tensors(self):
        state = self.runner.state().engines
        for name, part in (("policy", state.policy), ("critic", state.critic)):
            if part is not None:
                yield from ((f"{name}.{key}", tensor) for key, tensor in part.weights.items())
                for key, moments in part.optimizer.items():
                    yield from ((f"{name}.{key}.{which}", moment) for which, moment in moments.items())

    def whole(self) -> dict[str, int]:
        """Digests of weights and moments, put together over the ranks."""
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in self.tensors()}
        return {name: digest(t.detach().reshape(-1).contiguous()) for name, t in whole.items()}

    def own(self) -> dict[str, int]:
        """The same of what this rank holds."""
        held = {name: local(tensor).detach() for name, tensor in self.tensors()}
        return {name: digest(tensor.reshape(-1).contiguous()) for name, tensor in held.items() if tensor.numel()}

    def go_on(self) -> dict[str, int]:
        for seed in range(STEPS, STEPS + 2):
            self.step(seed)
        return self.own()


def troubles(phase: Phase, root: Path) -> list[str]:
    """What two ranks say of checkpoints that rank 1 cannot write its part of, and of one after that."""
    writer = CheckpointWriter(root, phase.runner, keep=2, peers=phase.peers)

    def save() -> str:
        writer.begin(run_epoch=1)
        saved = writer.finished(60.0)
        assert saved is not None
        return saved.error or saved.path

    said = [save()]
    phase.step(STEPS + 2)
    with pytest.MonkeyPatch.context() as patch:
        if phase.world.rank == 1:  # as on a host that does not share the folder: what rank 0 wrote is not there
            patch.setattr(checkpoint_writer, "SHARE_TIMEOUT_S", 0.3)
            patch.setattr(checkpoint_writer, "MARKER", "elsewhere")
        said.append(save())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if phase.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, unlimited[1]))
    said.append(save())
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    if phase.world.rank == 0:  # before it has a folder
        hidden = root.rename(root.with_name("hidden"))
        root.write_text("a file")
    said.append(save())
    if phase.world.rank == 0:
        root.unlink()
        hidden.rename(root)
        said.append(",".join(sorted(path.name for path in root.iterdir())))
    said.append(save())
    return said


def disturb(runner: StepRunner) -> None:
    """Other values everywhere: nothing may be equal by chance."""
    with torch.no_grad():
        for part in (runner.state().engines.policy, runner.state().engines.critic):
            for tensor in part.weights.values() if part else ():
                local(tensor).add_(1.0)
    torch.manual_seed(77)


def main() -> None:
    rank, folder, method, *ports = int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    config = config_of(method, folder / "model")
    numbers = map(int, ports)
    seen: dict[str, object] = {}
    for name, size in (("saves", 2), ("again", 2), ("three", 3), ("one", 1), ("back", 2)):
        port = next(numbers)
        if rank >= size:
            continue
        phase = Phase(rank, size, port, config)
        if name == "saves":
            for seed in range(STEPS):
                phase.step(seed)
            writer = CheckpointWriter(folder / "saved", phase.runner, keep=2, peers=phase.peers)
            writer.begin(run_epoch=1, desk_state=b"desk")
            seen["saves"] = phase.whole()
            phase.runner.engines.actor.export(folder / "export", None)
            seen["went on"] = phase.go_on()
            saved = writer.finished(60.0)
            seen["saved"] = saved is not None and saved.error == "" and saved.version == STEPS
        else:
            disturb(phase.runner)
            root = folder / ("saved by one" if name == "back" else "saved")
            restored = load_checkpoint(root, phase.runner, peers=phase.peers)
            assert restored is None or phase.world.rank or restored.desk_state == (b"" if name == "back" else b"desk")
            seen[name] = phase.whole() if restored and restored.version == STEPS == phase.runner.version else None
            if name == "one":
                save_checkpoint(folder / "saved by one", phase.runner, run_epoch=1)
            seen[f"{name} went on"] = phase.go_on()
            if name == "again":
                seen["troubles"] = troubles(phase, folder / "troubled")
        phase.world.close()
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

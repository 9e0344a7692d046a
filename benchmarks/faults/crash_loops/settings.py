"""The configuration of a crash loop: one file in its folder, read by every process of the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from asyncrl.config import Config

VOCAB = 1000
FILE = "settings.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the run is, and how fast."""

    port: int
    steps: int
    kills: int  # that happen before the run can end
    groups_per_step: int = 32
    group_size: int = 64
    max_new_tokens: int = 4
    max_sequences: int = 1024  # of each generator
    token_s: float = 0.05
    step_s: float = 0.02
    checkpoint_every: int = 5
    vocab: int = VOCAB
    real_trainer: bool = False  # a model that is trained, in place of a chain of hashes

    def write(self, folder: Path) -> None:
        """Writes the file, and the folder of a model that nobody loads."""
        model = folder / "model"
        if self.real_trainer:
            from benchmarks.speed.models import make_model

            make_model(model, "0.8M")
            (folder / FILE).write_text(json.dumps(asdict(self)))
            return
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "architectures": ["Stub"]}))
        (model / "tokenizer.json").write_text("{}")
        (model / "model.safetensors").touch()
        (folder / FILE).write_text(json.dumps(asdict(self)))


def settings_of(folder: Path) -> Settings:
    """The settings of the run in `folder`."""
    return Settings(**json.loads((folder / FILE).read_text()))


def config_of(folder: Path) -> Config:
    """The configuration of the run in `folder`."""
    settings = settings_of(folder)
    config = Config()
    if settings.real_trainer:
        # Stub engines hold no weights: they join no channel, so that each broadcast ends by its deadline, and what
        # they answer to the canary is no measurement.
        config.weights.timeout_s, config.weights.canary_tolerance = 1.0, 1e6
        config.model.max_length, config.learner.micro_batch_tokens = 64, 1024
        config.learner.device, config.learner.lr = "cpu", 1e-3
    config.run.name, config.run.dir, config.run.steps = "crash-loops", str(folder / "run"), settings.steps
    config.model.path = str(folder / "model")
    config.task.path = "benchmarks.faults.crash_loops.stub_task:StubTask"
    config.transport.address = f"tcp://127.0.0.1:{settings.port}"
    config.learner.groups_per_step = settings.groups_per_step
    config.learner.max_trainer_restarts = 1000
    config.log.level = "info"
    config.sampling.group_size, config.sampling.max_new_tokens = settings.group_size, settings.max_new_tokens
    config.generator.max_sequences = settings.max_sequences
    config.generator.lease_timeout_s = 60.0
    if not settings.real_trainer:
        config.weights.timeout_s = 5.0
    config.checkpoint.every = settings.checkpoint_every
    config.eval.prompts = 0
    return config

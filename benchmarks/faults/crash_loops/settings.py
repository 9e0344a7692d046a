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
    groups_per_step: int = 32
    group_size: int = 64
    max_new_tokens: int = 4
    max_sequences: int = 1024  # of each generator
    token_s: float = 0.05
    step_s: float = 0.02
    checkpoint_every: int = 5

    def write(self, folder: Path) -> None:
        """Writes the file, and the folder of a model that nobody loads."""
        model = folder / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "architectures": ["Stub"]}))
        (model / "tokenizer.json").write_text("{}")
        (model / "model.safetensors").touch()
        (folder / FILE).write_text(json.dumps(asdict(self)))


def settings_of(folder: Path) -> Settings:
    """The settings of the run in `folder`."""
    return Settings(**json.loads((folder / FILE).read_text()))


def token_s_of(folder: Path) -> float:
    """Seconds that a stub engine takes for a token."""
    return settings_of(folder).token_s


def config_of(folder: Path) -> Config:
    """The configuration of the run in `folder`."""
    settings = settings_of(folder)
    config = Config()
    config.run.name, config.run.dir, config.run.steps = "crash-loops", str(folder / "run"), settings.steps
    config.model.path = str(folder / "model")
    config.task.path = "benchmarks.faults.crash_loops.stub_task:StubTask"
    config.transport.address = f"tcp://127.0.0.1:{settings.port}"
    config.learner.groups_per_step = settings.groups_per_step
    config.learner.max_trainer_restarts = 1000
    config.sampling.group_size, config.sampling.max_new_tokens = settings.group_size, settings.max_new_tokens
    config.generator.max_sequences = settings.max_sequences
    config.generator.lease_timeout_s = 60.0
    config.weights.timeout_s = 5.0
    config.checkpoint.every = settings.checkpoint_every
    config.eval.prompts = 0
    return config

"""The configuration: all sections. `config.loading` loads and checks.

The same file configures both daemons, so that what they must agree on is written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncrl.config.daemon_sections import (
    CheckpointConfig,
    GeneratorConfig,
    LearnerConfig,
    LogConfig,
    RunConfig,
    TransportConfig,
    WeightsConfig,
)
from asyncrl.config.method_sections import (
    AlgorithmConfig,
    CriticConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    StalenessConfig,
    TaskConfig,
    UpdateConfig,
)

# Keys that had another name once, old → new. The old name is refused in a message with the new one.
RENAMED_KEYS: dict[str, str] = {}


@dataclass
class Config:
    """All sections. Both daemons read the same file."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

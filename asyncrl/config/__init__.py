"""The configuration of both daemons: the `*_sections` declare every key, `loading` reads and checks files."""

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
from asyncrl.config.schema import Config

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "EvalConfig",
    "GeneratorConfig",
    "LearnerConfig",
    "LogConfig",
    "ModelConfig",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "StalenessConfig",
    "TaskConfig",
    "TransportConfig",
    "UpdateConfig",
    "WeightsConfig",
]

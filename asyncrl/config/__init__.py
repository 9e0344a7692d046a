"""The configuration of both daemons: `schema` declares every key, `loading` reads and checks files."""

from asyncrl.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    GeneratorConfig,
    LearnerConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StalenessConfig,
    TaskConfig,
    TransportConfig,
    WeightsConfig,
)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "EvalConfig",
    "GeneratorConfig",
    "LearnerConfig",
    "LogConfig",
    "ModelConfig",
    "RunConfig",
    "SamplingConfig",
    "StalenessConfig",
    "TaskConfig",
    "TransportConfig",
    "WeightsConfig",
]

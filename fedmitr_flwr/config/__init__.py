"""The settings: what there is, what may stand in it, and how it is read."""

from .config import Config
from .sections import (
    DataConfig,
    DistillConfig,
    EnsembleConfig,
    EvaluateConfig,
    FedDFConfig,
    FlowerConfig,
    InversionConfig,
    KrumConfig,
    LocalConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    RelabelConfig,
    ScreenConfig,
    UploadConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "DistillConfig",
    "EnsembleConfig",
    "EvaluateConfig",
    "FedDFConfig",
    "FlowerConfig",
    "InversionConfig",
    "KrumConfig",
    "LocalConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RelabelConfig",
    "ScreenConfig",
    "UploadConfig",
]

"""The settings: what there is, what may stand in it, and how it is read."""

from .config import Config
from .sections import (
    DataConfig,
    EnsembleConfig,
    FlowerConfig,
    InversionConfig,
    LocalConfig,
    ModelConfig,
    PartitionConfig,
    UploadConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EnsembleConfig",
    "FlowerConfig",
    "InversionConfig",
    "LocalConfig",
    "ModelConfig",
    "PartitionConfig",
    "UploadConfig",
]

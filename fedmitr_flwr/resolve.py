"""Settings that follow from the data and the model's name, filled in once, before anything starts."""

from dataclasses import replace

from .config import Config
from .data.layout import found_source


def resolve(config: Config) -> Config:
    """`config` with nothing left to be found out: what the run folder keeps and the clients are sent."""
    return replace(config, data=found_source(config.data))

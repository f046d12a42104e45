"""What is wrong with a run and can be seen before any node is there: settings, files, the device, the model."""

import os
import tomllib
from logging import getLogger
from pathlib import Path

from .. import methods
from ..common.compute import resolve_device
from ..common.errors import ConfigError, unread
from ..config import Config, recipe
from ..config.sections import ONE_SHOT, OWN
from ..config.unread import unread_line
from ..data.own import named_classes
from ..data.shares import server_images
from ..resolve import resolve
from ..runs.folder import RunFolder
from ..vit.build import initial_weights
from . import strategies

log = getLogger("fedmitr")


def require_possible(config: Config) -> None:
    """Raise ConfigError for settings that cannot work together, wherever the run takes place."""
    if config.flower.strategy != ONE_SHOT:
        strategies.check(config)
        return
    methods.check(config)
    if config.flower.options:
        raise ConfigError(
            f"flower.options = {config.flower.options!r} is of a strategy that Flower ships; leave it empty, "
            "or set flower.strategy to that one"
        )
    if config.flower.rounds != 1:
        raise ConfigError(
            f"flower.rounds = {config.flower.rounds}, but one shot is one round; "
            "set flower.rounds = 1, or flower.strategy to one of Flower's own"
        )


def require_connection(name: str) -> None:
    """Raise ConfigError where Flower's configuration has no SuperLink of this name."""
    path = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "config.toml"
    try:
        known = tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(unread("configuration of Flower", path, error)) from error
    connection = known.get("superlink", {}).get(name)
    if not isinstance(connection, dict):
        raise ConfigError(f"{path} has no [superlink.{name}]; write it there, as deploy/README.md says")


def prepared(config: Config) -> Config:
    """The settings of this machine's run, complete.

    Raises:
        UserError: the settings cannot work together, the device is not there, the model cannot be built, the test
            images cannot be read, or the run to continue is none.
    """
    if chosen := recipe.chosen_line(config):
        log.info("%s", chosen)
    if without_effect := unread_line(config, methods.unread(config)):
        log.warning("%s", without_effect)
    config = resolve(config)
    if config.partition.scheme == OWN:
        config = named_classes(config)
    require_possible(config)
    resolve_device(config.device)
    initial_weights(config.model, config.seed)
    if config.evaluate.where == "server":
        server_images(config)
    if config.resume_from:
        RunFolder.open(config.resume_from)
    return config

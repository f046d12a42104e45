"""What a run was, in words: from its settings as result.json has them."""

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ..common.errors import printable
from ..common.outside import is_file
from ..config import Config
from ..config.sections import ONE_SHOT, OWN
from ..config.text import OUTSIDE, PATHS, PLACES

_NOT_SHOWN = (*PLACES, "flower.clients")  # where the run lies, and who took part

Flat = Mapping[str, Any]


def data_set(config: Flat) -> str:
    """The name of what was read: its folder, or its source. Early runs on digits may have a path that was not read."""
    source = str(config["data.source"])
    return source if source == "digits" else PurePath(config["data.path"]).name or source


def skew(config: Flat) -> str:
    scheme = config["partition.scheme"]
    names = {
        "dirichlet": f"Dirichlet {config['partition.alpha']:g}",
        "classes-per-client": f"{config['partition.classes-per-client']} classes per client",
        "iid": "IID",
        "own": "images of their own",
    }
    return names[scheme]


def model(config: Flat) -> str:
    name = config["model.name"]
    return f"{'small ViT' if name == 'small' else name}, {config['model.img-size']} px"


def measure(config: Flat) -> str:
    """On which images accuracies are; before there were validation images, they were all on test images."""
    return "Validation accuracy" if config.get("data.validation") else "Test accuracy"


def evaluated(on: Mapping[str, Any] | None) -> str:
    """On what, from `evaluated_on`, which some early results lack."""
    if not on:
        return "No evaluation is recorded."
    if on["where"] == "clients":
        return f"On {on['images']} images that the clients held out."
    return f"On {on['images']} {on['split']} images of the server, after the last epoch."


def command(config: Mapping[str, Any]) -> str:
    """The line that makes the run again, from its settings by dotted key."""
    own, defaults = config["partition.scheme"] == OWN, Config().to_flat()
    words = ["fedmitr", "run" if config["flower.strategy"] == ONE_SHOT and not own else "simulate"]
    for key, value in config.items():
        if key in defaults and value != defaults[key] and key not in _NOT_SHOWN:
            short = key in PATHS or (key in OUTSIDE and is_file(value))
            shown = PurePath(value).name if short and PurePath(value).is_absolute() else value
            words.append(f"{key}={str(shown).lower() if isinstance(shown, bool) else shown}")
    return printable(shlex.join(words))

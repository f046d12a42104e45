"""What a run was, in words: from its settings as result.json has them."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

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

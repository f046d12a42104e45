"""`fedmitr predict`: the classes of image files, by the model of a run folder. No other data are needed."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..common.compute import resolve_device, threads
from ..common.errors import ConfigError, DataError, RunError, printable, say_once, unread
from ..common.files import load_tensors, read_text
from ..data.decode import decode
from ..data.images import Images
from ..data.layout import contents, listed
from ..data.sources import ImageFiles
from ..runs.evaluation import scores_of
from ..runs.folder import RunFolder
from ..vit.taps import network_of


def predictions(folder: RunFolder, places: Sequence[Path], top: int = 1) -> Iterator[str]:
    """One line per image, in the order of `places`: its name, then class and probability of the `top` classes, by tabs.

    All images are decoded together, as a test split is: those of 16 bits are scaled alike.

    Raises:
        RunError: the folder has no model, or one that is not its own.
        DataError: there is no such file or folder, or it is no image; it is named.
    """
    config, model = folder.config, folder.config.model
    if top < 1:
        raise ConfigError(f"--top = {top}: give 1 or more classes to show")
    network = trained(folder)
    classes, files = class_names(folder), _files(places)
    pixels = decode(ImageFiles(files), np.arange(len(files)), model.in_chans, model.img_size)
    # A run on a GPU is looked at elsewhere, too.
    device = resolve_device("auto" if config.device.startswith("cuda") else config.device)
    images = Images(pixels, torch.zeros(len(files), dtype=torch.int64))
    with threads(config.threads):
        scores_MY = scores_of(network.to(device), images, model, device)
    chances, best = scores_MY.softmax(-1).topk(min(top, model.num_classes))
    for file, row, numbers in zip(files, chances.tolist(), best.tolist(), strict=True):
        cells = [
            cell for chance, number in zip(row, numbers, strict=True) for cell in (classes[number], f"{chance:.4f}")
        ]
        yield "\t".join(map(printable, (str(file), *cells)))


def trained(folder: RunFolder) -> nn.Module:
    """The model of a run folder.

    Raises:
        RunError: there is none, or it is not of the settings beside it.
    """
    if not folder.model_path.exists():
        raise RunError(
            f"{folder.path} has no model.safetensors: it has not ended, or {folder.config.method!r} makes no single "
            "model; resume it, or fuse it by another method"
        )
    weights, _ = load_tensors(folder.model_path)
    try:
        return network_of(folder.config.model, weights)
    except RuntimeError as error:  # other names or shapes
        wrong = f"{folder.model_path} is not a model of the settings in config.toml beside it; restore it"
        raise RunError(wrong) from error


def _files(places: Sequence[Path]) -> list[Path]:
    """The image files, and those in the folders and all below them."""
    files: list[Path] = []
    for place in places:
        if not place.is_dir():
            if not place.is_file():
                raise DataError(f"{place}: there is no such file or folder; give the path of an image")
            files.append(place)
            continue
        with listed():
            found = contents(place)
        if found.passed_over:
            say_once(f"{place}: {found.passed_over}")
        if not found.images:
            raise DataError(f"{place}: no image files in this folder; give one that has some")
        files += found.images
    return files


def class_names(folder: RunFolder) -> list[str]:
    """In the order of the scores; a folder of 0.1.0 has them in its result only."""
    path, number = folder.model_config_path, folder.config.model.num_classes
    if not path.exists():
        names = list(folder.read_result()["accuracy"]["per_class"])
        return names if len(names) == number else list(map(str, range(number)))
    try:
        names = json.loads(read_text(path))["label_names"]
        if not (isinstance(names, list) and len(names) == number and all(isinstance(name, str) for name in names)):
            raise ValueError(f"its label_names are not {number} names")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(unread("model's description", path, error)) from error
    return names

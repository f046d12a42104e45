"""What the data itself says of the model that it needs: how many classes, which channels, how large."""

import functools
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..common.errors import DataError
from ..config import Config, DataConfig
from ..config.sections import OWN
from .decode import opened
from .sources import open_split

MOST_CLASSES = 100_000  # higher numbers are ids
LOOKED_AT = 64  # images whose headers are read, spread evenly over the split

_GREY = {"1", "L", "LA", "La", "I", "F"}  # Pillow's modes of one channel; of 16 bits there are more


@dataclass(frozen=True)
class Facts:
    """What is known of the images; 0 is unknown."""

    classes: int  # how many
    channels: int  # 1 where every image looked at is grey, else 3
    side: int  # of all images looked at, in pixels, where they are square and of one size
    named: bool  # whether the classes have names: else there may be more than the labels say
    least: int = 0  # the lowest label; 0 where the classes have names


def facts(config: Config) -> Facts:
    """Of the train split; with partition.scheme = "own" of the server's own images, where it has any.

    Raises:
        DataError: the data cannot be read.
    """
    data, names, own = config.data, len(config.data.class_names), config.partition.scheme == OWN
    at_server = config.evaluate.where == "server"
    if own and not at_server and data.source != "digits":
        return Facts(names, 0, 0, named=True)
    found = _facts(data, alone=own and at_server)
    return replace(found, classes=names, named=True) if own and names else found


@functools.lru_cache(maxsize=4)
def _facts(data: DataConfig, *, alone: bool) -> Facts:
    """Of the train split; `alone`: of the test split, whatever train split is beside it."""
    split = open_split(data, "test" if alone else "train", alone=alone)
    if not len(split.labels):
        raise DataError(f"{data.path or data.source}: no images; put some there or choose another data.path")
    classes = len(split.classes) if split.classes else int(split.labels.max()) + 1
    if classes > MOST_CLASSES:
        row = int(split.labels.argmax())
        raise DataError(
            f"{split.where(row)}: label {classes - 1} numbers no class; number the classes from 0, or store their names"
        )
    grey, sides = True, set[int]()
    rows = np.unique(np.linspace(0, len(split.labels) - 1, min(len(split.labels), LOOKED_AT)).astype(np.int64))
    for row, encoded in zip(rows.tolist(), split.encoded(rows), strict=True):
        with opened(encoded, split.where(row)) as image:
            sides.update(image.size)
            grey = grey and _is_grey(image)
    side = sides.pop() if len(sides) == 1 else 0
    named = split.classes is not None
    return Facts(classes, 1 if grey else 3, side, named=named, least=0 if named else int(split.labels.min()))


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        colours = np.asarray(image.convert("RGB"))
        return bool((colours == colours[..., :1]).all())
    return image.mode in _GREY or image.mode.startswith("I;16")

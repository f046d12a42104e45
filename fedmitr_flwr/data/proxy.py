"""Real images without labels at the server, for methods that have some. FedMITR has none."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ..common.errors import ConfigError, DataError, say_once
from ..config import Config
from .decode import Encoded, decode
from .layout import TRAIN_NAMES, contents, listed, parquet_splits
from .sources import FolderSplit, load_proxy_share
from .tables import ParquetTable, TableImages, find_images


def require_proxy(config: Config) -> None:
    """Raise ConfigError where the settings name no such images, DataError where their folder is not there."""
    if config.feddf.path:
        _folder(config)
    elif not config.data.proxy:
        raise ConfigError(
            f"method = {config.method!r} needs real images without labels; set feddf.path to a folder of them, "
            "or data.proxy to the share of the training images that it gets and no client"
        )


def proxy_pixels(config: Config) -> Tensor:
    """The images of `feddf.path`, or else of `data.proxy`: uint8 (n, C, H, W). No label is read.

    Raises:
        DataError: there are none, or images beside Parquet files, or one is unreadable; the thing is named.
    """
    model = config.model
    if not config.feddf.path:
        return load_proxy_share(config.data, model)
    folder, path = _folder(config), config.feddf.path
    with listed():
        found, tables = contents(folder), parquet_splits(folder, TRAIN_NAMES)
    if found.images and tables:
        raise DataError(f"feddf.path = {path!r}: there are images and {tables[0][1][0].name} in {folder}; keep one")
    if found.images:
        if found.passed_over:
            say_once(f"{folder}: {found.passed_over}")
        images: Encoded = FolderSplit([folder], (folder.name,))
        number = len(found.images)
    elif tables:
        table = ParquetTable(tables[0][1], folder)
        fix = "for feddf.path keep one of encoded images among its columns: "
        images, number = TableImages(table, find_images(table, "", fix)), len(table)
    else:
        raise DataError(f"feddf.path = {path!r}: neither images nor train*.parquet in {folder}")
    return decode(images, np.arange(number), model.in_chans, model.img_size)


def _folder(config: Config) -> Path:
    folder = Path(config.feddf.path).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"feddf.path = {config.feddf.path!r}: there is no folder {folder}; give that of the images")
    return folder

"""Real images without labels at the server, for methods that have some. FedMITR has none."""

from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..errors import ConfigError, DataError
from .decode import Encoded, decode
from .sources import FolderSplit, images_in, kept, load_proxy_share
from .tables import ParquetImages, find_files


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
        DataError: there are none, or one is unreadable; the thing is named.
    """
    feddf, model = config.feddf, config.model
    if not feddf.path:
        pixels = load_proxy_share(config.data, model)
        return pixels[torch.from_numpy(kept(len(pixels), feddf.limit, "proxy"))]
    images, number = _open(_folder(config), feddf.path)
    return decode(images, kept(number, feddf.limit, "proxy"), model.in_chans, model.img_size)


def _folder(config: Config) -> Path:
    folder = Path(config.feddf.path).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"feddf.path = {config.feddf.path!r}: there is no folder {folder}; give that of the images")
    return folder


def _open(folder: Path, path: str) -> tuple[Encoded, int]:
    """The images and their number."""
    if files := images_in(folder):
        return FolderSplit([folder], (folder.name,)), len(files)
    try:
        files = find_files(folder, ("train",))
    except DataError as error:
        raise DataError(f"feddf.path = {path!r}: neither images nor train*.parquet in {folder}") from error
    images = ParquetImages(files, fix="for feddf.path keep one of encoded images among its columns")
    return images, len(images)

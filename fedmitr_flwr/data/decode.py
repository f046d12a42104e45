"""Encoded pictures (PNG, JPEG, WebP and whatever else Pillow reads) to one uint8 tensor."""

import io
import struct
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DataError

PixelArray = NDArray[np.uint8]
Rows = NDArray[np.int64]

# What Pillow and its codecs raise on bytes that are no picture, or only a part of one.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class Encoded(Protocol):
    """Images before decoding."""

    def where(self, row: int) -> str:
        """The place of a row, for messages."""

    def encoded(self, rows: Rows) -> Iterator[bytes]:
        """The encoded images of `rows` (rising), in that order."""


class Split(Encoded, Protocol):
    """A train or test split before decoding."""

    @property
    def labels(self) -> Rows:
        """(n,) as the source has them, unchecked."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where the source knows them."""


def decode(split: Encoded, rows: Rows, in_chans: int, img_size: int) -> Tensor:
    """Decode each of `rows` once, to uint8 (n, C, H, W).

    Images of one size keep it. If sizes differ, every image is resized to `img_size` as it is decoded, so that large
    photographs are never all in memory. There is no thread pool: at 28 to 256 px it measured slower than one thread.

    Raises:
        DataError: an image is unreadable; its file or row is named.
    """
    pixels = np.empty((0, 0, 0, in_chans), dtype=np.uint8)
    mixed = False
    for i, (row, encoded) in enumerate(zip(rows.tolist(), split.encoded(rows), strict=True)):
        image = _decode_one(encoded, in_chans, split.where(row))
        if i == 0:
            pixels = np.empty((len(rows), *image.shape), dtype=np.uint8)
        elif not mixed and image.shape != pixels.shape[1:]:
            mixed = True
            pixels = _resized_so_far(pixels, i, img_size)
        pixels[i] = _resize(image, img_size) if mixed else image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _resized_so_far(pixels: PixelArray, done: int, side: int) -> PixelArray:
    resized = np.empty((len(pixels), side, side, pixels.shape[-1]), dtype=np.uint8)
    for i in range(done):
        resized[i] = _resize(pixels[i], side)
    return resized


def _decode_one(encoded: bytes, in_chans: int, where: str) -> PixelArray:
    """(H, W, C)."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return _channels(_upright(image), in_chans)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: not a readable image ({reason}); repair it or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    """Cameras store photographs lying on their side and say so; only their formats are asked, for speed."""
    return ImageOps.exif_transpose(image) if image.format in ("JPEG", "MPO") else image


def _channels(image: Image.Image, in_chans: int) -> PixelArray:
    """Luminance for one channel, RGB (grey repeated) for three. (H, W, C)."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip these 16 bits to white
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"Pillow mode {image.mode}, which has no fixed range; save it with 8 or 16 bits")
    array = np.asarray(image.convert("L" if in_chans == 1 else "RGB"))
    return array[..., None] if in_chans == 1 else array


def _resize(image: PixelArray, side: int) -> PixelArray:
    """(H, W, C) to (side, side, C), antialiased bilinear."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
    return resized.reshape(side, side, -1)

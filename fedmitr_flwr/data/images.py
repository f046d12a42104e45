"""Decoded images, and the one place where pixels become what a model sees and back again.

Shapes: n images of a set, B images of a batch, C channels, H x W pixels, S the model's image size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..config import ModelConfig
from ..vit.names import RESIZED, normalisation


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images at their native size. Treat them as read-only: the loaders cache them for the whole process.

    pixels: (n, C, H, W) uint8; labels: (n,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        assert self.pixels.dtype == torch.uint8, self.pixels.dtype
        assert self.pixels.ndim == 4, self.pixels.shape
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.labels.shape == self.pixels.shape[:1], (self.labels.shape, self.pixels.shape)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Images":
        """Copy the images at `indices` (int64), in that order."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class DataSet:
    train: Images
    test: Images
    classes: tuple[str, ...]


def value_range(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """The least (C,) and the greatest (C,) normalised value of a picture."""
    mean, std = normalisation(model)
    return (0 - mean) / std, (1 - mean) / std


def prepare(pixels_uint8_BCHW: Tensor, model: ModelConfig) -> Tensor:
    """Resize (antialiased bilinear, only if needed) and normalise: float32 (B, C, S, S) on the pixels' device."""
    images = pixels_uint8_BCHW.float() / 255
    size = (model.img_size, model.img_size)
    if images.shape[-2:] != size:
        images = functional.interpolate(images, size=size, mode=RESIZED, align_corners=False, antialias=True)
    mean, std = _statistics_like(images, model)
    return (images - mean) / std


def to_uint8(images_BCHW_normalised: Tensor, model: ModelConfig) -> Tensor:
    """Inverse of the normalisation, clamped to uint8 (B, C, S, S): pictures to look at."""
    images = images_BCHW_normalised.detach()
    mean, std = _statistics_like(images, model)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _statistics_like(images_BCHW: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor]:
    mean, std = normalisation(model)
    return mean.to(images_BCHW.device)[:, None, None], std.to(images_BCHW.device)[:, None, None]  # (C, 1, 1)

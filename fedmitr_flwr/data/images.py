"""Decoded images, and the one place where pixels become what a model sees and back again.

Shapes: n images of a set, B images of a batch, C channels, H x W pixels, S the model's image size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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


def normalisation(in_chans: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and standard deviation (C,) on the 0..1 scale: ImageNet's for colour, 0.5 and 0.5 otherwise."""
    if in_chans == 3:
        return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return torch.full((in_chans,), 0.5), torch.full((in_chans,), 0.5)


def value_range(in_chans: int) -> tuple[Tensor, Tensor]:
    """The least (C,) and the greatest (C,) normalised value of a picture."""
    mean, std = normalisation(in_chans)
    return (0 - mean) / std, (1 - mean) / std


def prepare(pixels_uint8_BCHW: Tensor, img_size: int) -> Tensor:
    """Resize (antialiased bilinear, only if needed) and normalise: float32 (B, C, S, S) on the pixels' device."""
    images = pixels_uint8_BCHW.float() / 255
    if images.shape[-2:] != (img_size, img_size):
        images = functional.interpolate(
            images, size=(img_size, img_size), mode="bilinear", align_corners=False, antialias=True
        )
    mean, std = _statistics_like(images)
    return (images - mean) / std


def to_uint8(images_BCHW_normalised: Tensor) -> Tensor:
    """Inverse of the normalisation, clamped to uint8 (B, C, S, S): pictures to look at."""
    images = images_BCHW_normalised.detach()
    mean, std = _statistics_like(images)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _statistics_like(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = normalisation(images_BCHW.shape[1])
    return mean.to(images_BCHW.device)[:, None, None], std.to(images_BCHW.device)[:, None, None]  # (C, 1, 1)

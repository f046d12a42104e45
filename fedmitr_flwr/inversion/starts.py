"""What an inversion starts from: white noise, or drawn images, which look more like pictures.

Optimisation changes a start where the teachers look, and hardly elsewhere; patches that are halted stay as they are.
What the start is like therefore stays visible in the images by which the student learns to see (docs/LOG.md).

Shapes: B images, C channels, S x S pixels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import ModelConfig
from ..data.images import value_range

MOST_LEAVES = 24  # in an image; their number is uniform from 1
SMALLEST = 0.08  # least radius of a leaf, in halves of the image's side
LARGEST = 0.96
STRETCH = 0.75  # a leaf is up to e^(2 · 0.75) = 4.5 times as long as wide

Start = Callable[[int, ModelConfig, torch.Generator], Tensor]  # -> B normalised images (B, C, S, S), on the CPU


def noise(batch: int, model: ModelConfig, rng: torch.Generator) -> Tensor:
    """Each number ~ N(0, 1) (SMI [C])."""
    return torch.randn(batch, model.in_chans, model.img_size, model.img_size, generator=rng)


def leaves(batch: int, model: ModelConfig, rng: torch.Generator) -> Tensor:
    """`dead_leaves`, for inversion [M]."""
    low, high = (end[:, None, None] for end in value_range(model))
    return torch.lerp(low, high, dead_leaves((batch, model.in_chans, model.img_size, model.img_size), rng))


def dead_leaves(size: tuple[int, int, int, int], rng: torch.Generator) -> Tensor:
    """Images (B, C, S, S) in 0..1 of leaves that fell on each other: ellipses and rectangles, each of one colour.

    The model (Matheron 1968; Lee, Mumford & Huang 2001) has edges, flat regions, occlusion and a power that falls with
    frequency about as in photographs. Networks can learn to see from such images alone (Baradad et al. 2021) [C]; the
    shapes, their number and their sizes are ours [M]. Places, colours, angles and the logarithms of sizes are uniform.
    """
    batch, channels, side, _ = size

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=rng)

    line = torch.linspace(-1, 1, side)
    rows, columns = line[:, None], line
    images = uniform(channels, 1, 1).expand(size)
    leaves = torch.randint(1, MOST_LEAVES + 1, (batch, 1, 1), generator=rng)
    for leaf in range(MOST_LEAVES):
        down, right = rows - (2 * uniform(1, 1) - 1), columns - (2 * uniform(1, 1) - 1)
        radius = SMALLEST * (LARGEST / SMALLEST) ** uniform(1, 1)
        stretch = (STRETCH * (2 * uniform(1, 1) - 1)).exp()
        angle = math.pi * uniform(1, 1)
        along = (right * angle.cos() + down * angle.sin()) / (radius * stretch)
        across = (down * angle.cos() - right * angle.sin()) / (radius / stretch)
        ellipse = along.square() + across.square() < 1
        rectangle = torch.maximum(along.abs(), across.abs()) < 1
        covered = torch.where(uniform(1, 1) < 0.5, ellipse, rectangle) & (leaf < leaves)  # (B, S, S)
        images = torch.where(covered[:, None], uniform(channels, 1, 1), images)
    return images

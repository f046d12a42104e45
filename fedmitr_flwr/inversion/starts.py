"""What an inversion starts from: white noise, or dead leaves, images of nobody that look more like photographs.

Optimisation changes a start where the teachers look, and hardly elsewhere; patches that are halted stay as they are.
What the start is like therefore stays visible in the images by which the student learns to see (docs/adr/0013).

Shapes: B images, C channels, S x S pixels.
"""

import math

import torch
from torch import Tensor

from ..data.images import value_range

MOST_LEAVES = 24  # in an image; their number is uniform from 1
SMALLEST = 0.08  # least radius of a leaf, in halves of the image's side
LARGEST = 0.96
STRETCH = 0.75  # a leaf is up to e^(2 · 0.75) = 4.5 times as long as wide


def starting_images(kind: str, batch: int, in_chans: int, img_size: int, rng: torch.Generator) -> Tensor:
    """Normalised images (B, C, S, S) to start from, on the CPU.

    - `noise`: each number ~ N(0, 1) (SMI [C]).
    - `leaves`: `dead_leaves`, for inversion [M].
    """
    size = (batch, in_chans, img_size, img_size)
    if kind == "noise":
        return torch.randn(size, generator=rng)
    low, high = (end[:, None, None] for end in value_range(in_chans))
    return torch.lerp(low, high, dead_leaves(size, rng))


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

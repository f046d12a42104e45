"""What an inversion starts from: white noise, or drawn images of nobody, which look more like pictures.

Optimisation changes a start where the teachers look, and hardly elsewhere; patches that are halted stay as they are.
What the start is like therefore stays visible in the images by which the student learns to see (docs/LOG.md).

Shapes: B images, C channels, S x S pixels.
"""

import math

import torch
from torch import Tensor

from ..config import ModelConfig
from ..data.images import value_range

MOST_LEAVES = 24  # in an image; their number is uniform from 1
SMALLEST = 0.08  # least radius of a leaf, in halves of the image's side
LARGEST = 0.96
STRETCH = 0.75  # a leaf or an object is up to e^(2 · 0.75) = 4.5 times as long as wide

WAVES = 6  # of an object's outline: its radius is a sum of so many, ever shorter and lower
WAVE = 0.5  # standard deviation of the longest one's height, where the mean radius is 1
SHALLOWEST = 0.25  # no outline comes nearer to the middle
RADII = 0.35, 0.85  # mean radius of an object, in halves of the image's side
OFF_CENTRE = 0.25  # how far its middle lies from the image's at most, likewise


def starting_images(kind: str, batch: int, model: ModelConfig, rng: torch.Generator) -> Tensor:
    """Normalised images (B, C, S, S) to start from, on the CPU.

    - `noise`: each number ~ N(0, 1) (SMI [C]).
    - `leaves`: `dead_leaves`, for inversion [M].
    - `objects`: `objects` [M].
    """
    size = (batch, model.in_chans, model.img_size, model.img_size)
    if kind == "noise":
        return torch.randn(size, generator=rng)
    low, high = (end[:, None, None] for end in value_range(model))
    drawn = {"leaves": dead_leaves, "objects": objects}[kind](size, rng)
    return torch.lerp(low, high, drawn)


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


def objects(size: tuple[int, int, int, int], rng: torch.Generator) -> Tensor:
    """Images (B, C, S, S) in 0..1 of one thing each, near the middle of a plain ground [M].

    As most labelled pictures have it, and no image of dead leaves. The thing's outline is `_outlined`; in it is one
    colour, or dead leaves. Half of the grounds are black or white, the others of any colour. The square roots of the
    images' saturations are uniform.
    """
    batch, channels = size[:2]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=rng)

    def half() -> Tensor:
        return uniform(1, 1, 1) < 0.5

    ground = torch.where(half(), half().float(), uniform(channels, 1, 1))
    filling = torch.where(half(), dead_leaves(size, rng), uniform(channels, 1, 1))
    images = torch.where(_outlined(batch, size[-1], rng)[:, None], filling, ground)
    return torch.lerp(images.mean(1, keepdim=True), images, uniform(1, 1, 1).square())


def _outlined(batch: int, side: int, rng: torch.Generator) -> Tensor:
    """(B, S, S), True = inside an outline whose radius, by angle, is a sum of waves; half of them are mirrored."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=rng)

    line = torch.linspace(-1, 1, side)
    middle = OFF_CENTRE * (2 * uniform(2, 1, 1) - 1)
    stretch = (STRETCH * (2 * uniform(1, 1) - 1)).exp()
    down, right = (line[:, None] - middle[:, 0]) * stretch, (line - middle[:, 1]) / stretch
    angle = torch.atan2(right, -down)  # (B, S, S), from straight up: waves without a phase are alike on both sides
    mirrored = uniform(1, 1) < 0.5
    radius = torch.ones(batch, 1, 1)
    for wave in range(1, WAVES + 1):
        height = WAVE / wave * torch.randn(batch, 1, 1, generator=rng)
        phase = torch.where(mirrored, 0.0, 2 * math.pi * uniform(1, 1))
        radius = radius + height * (wave * angle + phase).cos()
    smallest, largest = RADII
    size = smallest + (largest - smallest) * uniform(1, 1)
    return torch.hypot(down, right) < size * radius.clamp_min(SHALLOWEST)

"""What an inversion starts from: white noise, or dead leaves, which look more like photographs.

Optimisation changes a start where the teachers look, and hardly elsewhere; patches that are halted stay as they are.
What the start is like therefore stays visible in the images by which the student learns to see (docs/adr/0013).

Shapes: B images, C channels, S x S pixels.
"""

import torch
from torch import Tensor

from ..data.leaves import leaf_images


def starting_images(kind: str, batch: int, in_chans: int, img_size: int, rng: torch.Generator) -> Tensor:
    """Normalised images (B, C, S, S) to start from, on the CPU.

    - `noise`: each number ~ N(0, 1) (SMI [C]).
    - `leaves`: `leaf_images`, for inversion [M].
    """
    if kind == "noise":
        return torch.randn(batch, in_chans, img_size, img_size, generator=rng)
    return leaf_images(batch, in_chans, img_size, rng)

"""How the uploads lie to each other, as vectors of weights.

Shapes: K uploads, P numbers in a tensor.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .upload import Upload


def stacked(uploads: Sequence[Upload]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of all uploads, (K, ...); one at a time, so that uploads on disk take no more memory than that."""
    for name in uploads[0].weights:
        yield name, torch.stack([upload.weights[name] for upload in uploads])


def gram(uploads: Sequence[Upload], origin: Mapping[str, Tensor]) -> Tensor:
    """Inner products (K, K) of the updates `upload - origin`, over all floating tensors, in float64."""
    products_KK = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    for name, weights in stacked(uploads):
        if weights.is_floating_point():
            updates_KP = (weights.double() - origin[name].double()).flatten(1)
            products_KK += updates_KP @ updates_KP.T
    return products_KK


def squared_distances(gram_KK: Tensor) -> Tensor:
    """‖w_i - w_j‖², (K, K)."""
    squares_K = gram_KK.diag()
    return (squares_K[:, None] + squares_K - 2 * gram_KK).clamp_min(0)

"""The inversion loss, image by image, so that an image does not depend on the batch it is made in.

Shapes: B images, N patches, K alive, E numbers in a patch, Y classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(scores_BY: Tensor, targets_B: Tensor) -> Tensor:
    """-log of the ensemble's probability of the target: (B,)."""
    return F.cross_entropy(scores_BY, targets_B, reduction="none")


def total_variation(images_BCHW: Tensor) -> Tensor:
    """TV₂ of each image: (B,).

    ‖d_h‖₂ + ‖d_v‖₂ + ‖d_↘‖₂ + ‖d_↙‖₂, the four shifted differences of SMI [C]; theirs is one norm over the batch, ours
    one for each image [M].
    """
    x = images_BCHW
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., :-1, :-1] - x[..., 1:, 1:],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    # The small constant keeps the gradient of ‖0‖ finite: a constant image has none.
    return torch.stack([(d.square().sum((1, 2, 3)) + 1e-12).sqrt() for d in differences]).sum(0)

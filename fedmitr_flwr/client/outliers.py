"""Images of no class, on which a client learns to name none: outlier exposure (Hendrycks et al. 2019) [C].

A client that knows two classes sees one of them in whatever it is shown, and an ensemble believes it. No foreign image
is needed [M]: batches are in turn, by chance, of own images on their side, and of own ones whose patches are in random
order. Where images have no up (from above, or under a microscope), a turned one is an image of its class: leave it off.

Dead leaves, which inversion starts from, are no part of it: of teachers that name no class on them the student learns
less (docs/LOG.md).

Shapes: B images, N patches, E numbers in a patch, Y classes.
"""

import math

import torch
from torch import Tensor

from ..vit.tokens import TokenLogits, patchify
from .losses import TOKEN_LOSS

NO_SKEW = 0.05  # up to it, that of a sample of even classes; at no skew, these images cost no time


def skew(labels: Tensor, num_classes: int) -> float:
    """1 - H/log Y with H the entropy of the labels: 0 where all classes are as frequent, 1 for a class by itself [M].

    Below `NO_SKEW` it is 0. Who knows all classes evenly has seen enough that is not of a class; who knows few has only
    these images for it.
    """
    counts_Y = torch.bincount(labels, minlength=num_classes).double()
    entropy: float = torch.special.entr(counts_Y / counts_Y.sum()).sum().item()
    found = 1 - entropy / math.log(num_classes)
    return found if found > NO_SKEW else 0.0


def outliers(pixels_BCHW: Tensor, patch: int, rng: torch.Generator) -> Tensor:
    """Patches (M, N, E) of M = ⌈B/2⌉ images of no class, from a batch of the client's own."""
    own = pixels_BCHW[: -(-len(pixels_BCHW) // 2)]
    if torch.rand((), generator=rng) < 0.5:
        left_or_right = 1 + 2 * int(torch.randint(2, (1,), generator=rng))
        return patchify(own.rot90(left_or_right, (2, 3)), patch)
    patches = patchify(own, patch)
    order = torch.rand(patches.shape[:2], generator=rng).argsort(1).to(own.device)
    return patches.gather(1, order[..., None].expand_as(patches))


def evenness_loss(logits: TokenLogits) -> Tensor:
    """KL(even ‖ softmax) of the class token, plus `TOKEN_LOSS` times the mean over patch tokens of theirs."""
    return _from_even(logits.cls) + TOKEN_LOSS * _from_even(logits.patches)


def _from_even(logits_Y: Tensor) -> Tensor:
    """Mean over all but the last axis; 0 where all classes are equally likely."""
    return -logits_Y.log_softmax(-1).mean() - math.log(logits_Y.shape[-1])

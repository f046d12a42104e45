"""The losses of training at the client.

Shapes: B images, K patches, Y classes, n_k images at the client, n_{k,y} of them of class y.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vit.tokens import TokenLogits

# A client that lacks classes is taken to have seen this many images, spread evenly over all Y. An absent class then
# weighs 1/Y of an image: too little to push it down in a whole epoch as far as one image would, for any n_k and Y, and
# its logarithm is finite.
ABSENT_IMAGES = 1.0
TOKEN_LOSS = 0.5  # weight of the label's cross-entropy on every patch token [M]: patch logits must mean something


def label_loss(logits: TokenLogits, labels_B: Tensor, shift_Y: Tensor | None = None) -> Tensor:
    """Cross-entropy of the class token, plus `TOKEN_LOSS` times the mean over patch tokens of theirs.

    LV-ViT's objective (Jiang et al. 2021) with the image's label on every token [C]; without it the patch logits, which
    relabelling asks for, would mean nothing. `shift_Y` is added to all logits: see `prior_shift`.
    """
    cls_BY, patches_BKY = logits.cls, logits.patches
    if shift_Y is not None:
        cls_BY, patches_BKY = cls_BY + shift_Y, patches_BKY + shift_Y
    tokens_BYK = patches_BKY.transpose(1, 2)
    targets_BK = labels_B[:, None].expand(-1, tokens_BYK.shape[2])
    return F.cross_entropy(cls_BY, labels_B) + TOKEN_LOSS * F.cross_entropy(tokens_BYK, targets_BK)


def prior_shift(labels: Tensor, num_classes: int, strength: float) -> Tensor:
    """`strength` · log of the client's own class prior n_{k,y} / n_k: (Y,). Absent classes: see `ABSENT_IMAGES`.

    Logit adjustment (Menon et al. 2021) [C], at each client by its own prior [M]; FedLC (Zhang et al. 2022) takes
    another function of the client's counts. The network learns what the images say beside a prior that the clients do
    not share, and classes that a client lacks are hardly pushed down. In training only.
    """
    counts_Y = torch.bincount(labels, minlength=num_classes).float()
    return strength * (counts_Y.clamp_min(ABSENT_IMAGES / num_classes) / len(labels)).log()


def proximal(weights: Iterable[Tensor], start: Iterable[Tensor], mu: float) -> Tensor:
    """FedProx's term μ/2 ‖w - w⁰‖² (Li et al. 2020, eq. 2)."""
    squares = [(weight - old).square().sum() for weight, old in zip(weights, start, strict=True)]
    return mu / 2 * torch.stack(squares).sum()

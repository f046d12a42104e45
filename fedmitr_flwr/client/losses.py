"""The losses of training at the client.

Shapes: B images, K patches, Y classes, n_k images at the client, n_{k,y} of them of class y.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vit.tokens import TokenLogits

TOKEN_LOSS = 0.5  # weight of the label's cross-entropy on every patch token [M]: patch logits must mean something


def label_loss(logits: TokenLogits, labels_B: Tensor) -> Tensor:
    """Cross-entropy of the class token, plus `TOKEN_LOSS` times the mean over patch tokens of theirs.

    LV-ViT's objective (Jiang et al. 2021) with the image's label on every token [C]; without it the patch logits, which
    relabelling asks for, would mean nothing.
    """
    tokens_BYK = logits.patches.transpose(1, 2)
    targets_BK = labels_B[:, None].expand(-1, tokens_BYK.shape[2])
    return F.cross_entropy(logits.cls, labels_B) + TOKEN_LOSS * F.cross_entropy(tokens_BYK, targets_BK)


def proximal(weights: Iterable[Tensor], start: Iterable[Tensor], mu: float) -> Tensor:
    """FedProx's term μ/2 ‖w - w⁰‖² (Li et al. 2020, eq. 2)."""
    squares = [(weight - old).square().sum() for weight, old in zip(weights, start, strict=True)]
    return mu / 2 * torch.stack(squares).sum()

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


def label_loss(
    logits: TokenLogits, labels_B: Tensor, smoothing: float, token_weight: float, shift_Y: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the class token, plus `token_weight` times the mean over patch tokens of theirs.

    LV-ViT's objective (Jiang et al. 2021) with the image's label on every token [C]; without it the patch logits, which
    relabelling asks for, would mean nothing. `shift_Y` is added to all logits: see `prior_shift`.
    """
    loss = _cross_entropy(logits.cls, labels_B, smoothing, shift_Y)
    if token_weight:
        tokens_BYK = logits.patches.transpose(1, 2)
        targets_BK = labels_B[:, None].expand(-1, tokens_BYK.shape[2])
        loss = loss + token_weight * _cross_entropy(tokens_BYK, targets_BK, smoothing, shift_Y)
    return loss


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


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, shift_Y: Tensor | None) -> Tensor:
    """Of logits (B, Y) or (B, Y, K) with labels (B,) or (B, K), mean over images and tokens.

    Under a shift, label smoothing spreads its share by softmax(shift), not evenly [M]: both pull the logits without the
    shift towards equal ones. An even share would lift absent classes above all others.
    """
    if shift_Y is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    logp = (logits.movedim(1, -1) + shift_Y).log_softmax(-1)  # (B, Y) or (B, K, Y)
    hard = F.nll_loss(logp.flatten(0, -2), labels.flatten())
    return (1 - smoothing) * hard - smoothing * (logp @ shift_Y.softmax(0)).mean()

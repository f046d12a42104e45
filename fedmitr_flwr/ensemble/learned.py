"""Which teacher counts how much, learned from synthetic images by Co-Boosting's rule (Dai et al., ICLR 2024) [C].

Shapes: K teachers, M images, B of them in a batch, Y classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ensemble import combine_answers, log_probabilities

# Of Co-Boosting's code [C].
STEP = 0.01  # μ: how far a weight moves in the first round
DECAY = 0.99  # of the step, per round
BATCH = 128  # images that a step sees

FLAT = 1e-9  # a slope below this is rounding, whose sign would move weights that make no difference
TINY = 1e-300  # where only a teacher without weight names a class: its slope is steep, and finite


def learn(
    logits_KMY: Tensor,
    targets_M: Tensor,
    weights_K: Tensor,
    combine: str,
    r: int,
    rng: torch.Generator,
) -> Tensor:
    """Pass over the images once, in random batches; after each one, every weight moves by a step against its slope.

    w <- clip(w - μ dᵉ · sign(dCE/dw), 0, 1), with CE of the ensemble whose weights are w / Σ w. One weight for each
    teacher, whatever the class, as in the paper. That rounding errors do not count is ours [M].

    Args:
        logits_KMY: the teachers' answers on the images, made once: the teachers do not change.
        targets_M: the classes that the images were made for.
        weights_K: to start from, in 0..1, not all 0.
        combine: as `ensemble.combine`.
        r: the round, from 0.
        rng: of their order.

    Returns:
        The new weights (K,) in 0..1, not normalised, float64 on the CPU: it is little work, with equal bits anywhere.
    """
    logits, targets, weights = logits_KMY.cpu().double(), targets_M.cpu(), weights_K.cpu().double()
    step = STEP * DECAY**r
    for chosen in torch.randperm(len(targets), generator=rng).split(BATCH):
        weights = moved(weights, slope(logits[:, chosen], targets[chosen], weights, combine), step)
    return weights


def slope(logits_KBY: Tensor, targets_B: Tensor, weights_K: Tensor, combine: str) -> Tensor:
    """dCE/dw (K,) of the mean cross-entropy of the ensemble with the weights w / Σ w."""
    free_K = weights_K.detach().requires_grad_()
    shares_K1 = (free_K / free_K.sum())[:, None]
    with torch.enable_grad():
        if combine == "probs":  # not by log w, whose slope is infinite where w = 0
            scores_BY = _log_mixture(log_probabilities(logits_KBY), shares_K1)
        else:
            scores_BY = combine_answers(logits_KBY, shares_K1.expand(-1, logits_KBY.shape[2]), combine)
        loss = F.cross_entropy(scores_BY, targets_B)
    (slope_K,) = torch.autograd.grad(loss, free_K)
    return slope_K


def moved(weights_K: Tensor, slope_K: Tensor, step: float) -> Tensor:
    """One signed step, clipped; weights that would all be 0 stay as they are."""
    signs_K = slope_K.sign() * (slope_K.abs() > FLAT)
    new_K = (weights_K - step * signs_K).clamp(0, 1)
    return new_K if new_K.sum() > 0 else weights_K


def _log_mixture(log_KBY: Tensor, shares_K1: Tensor) -> Tensor:
    """Of what is mixed, log Σ w exp: (B, Y)."""
    top_BY = log_KBY.max(0).values
    mixed_BY = (shares_K1[..., None] * (log_KBY - top_BY).exp()).sum(0)
    return (mixed_BY + TINY).log() + top_BY

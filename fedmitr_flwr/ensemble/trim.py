"""The robust ensemble: per class, the most and the least sure teachers do not count [M].

Shapes: K teachers, B images, Y classes.
"""

import torch
from torch import Tensor

MOST = 0.499  # a half would leave nothing; this leaves the median, or, between two teachers, the mean of the two


@torch.no_grad()
def trimmed(probabilities_K: Tensor, weights_K: Tensor, share: float) -> Tensor:
    """The weights with which the teachers' mean becomes the weighted trimmed mean: (K, ..., Y), each sums to 1 over K.

    Class by class the teachers are ordered by their probability; of the weights so ordered, the first `share` and the
    last `share` are cut off, through a teacher's own weight where need be, and the rest is scaled up. With equal
    weights and share = m / K this is the trimmed mean without the m largest and the m smallest (Yin et al. 2018 [C]),
    with 0.5 the weighted median: teachers that together have less than `share` of a class's weight cannot drag it
    beyond what others say. For the gradient the weights are constants, which they are but where two teachers agree.

    Args:
        probabilities_K: (K, ..., Y).
        weights_K: of a shape that expands to that of the probabilities; sum to 1 over K.
        share: 0 to 0.5.
    """
    share = min(share, MOST)
    order_K = probabilities_K.argsort(dim=0, stable=True)
    upto_K = weights_K.expand_as(probabilities_K).gather(0, order_K).cumsum(0).clamp(share, 1 - share)
    below_K = torch.cat([torch.full_like(upto_K[:1], share), upto_K[:-1]])
    kept_K = (upto_K - below_K) / (1 - 2 * share)
    return torch.zeros_like(kept_K).scatter(0, order_K, kept_K)

"""Class routing: an image is shown only to teachers that know its target class [M].

Shapes: K teachers, B images, R of them routed to a teacher, Y classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Who is asked about which image."""

    rows: dict[int, Tensor | slice]  # by teacher, the images (R,) it is asked about, as an index; of none: absent
    weights: Tensor  # (K, B, Y), or (K, 1, Y) where all images have the same; sum to 1 over K
    share: float  # of the K · B questions, how many are asked


def everyone(weights_KY: Tensor) -> Routing:
    """Every teacher is asked about every image."""
    return Routing(dict.fromkeys(range(len(weights_KY)), slice(None)), weights_KY[:, None], 1.0)


def route(weights_KY: Tensor, targets_B: Tensor, threshold: float) -> Routing:
    """Ask about an image of class y only the teachers with w_ky >= threshold · max_j w_jy.

    The weights of those asked are scaled to sum to 1 for each class; for a class of which none of them has any, they
    count equally. `threshold` 0 is everyone, 1 the most competent teacher alone.
    """
    if threshold <= 0:
        return everyone(weights_KY)
    competence_KY = weights_KY / weights_KY.max(0).values
    asked_KB = competence_KY[:, targets_B] >= threshold
    kept_KBY = weights_KY[:, None] * asked_KB[..., None]
    total_BY = kept_KBY.sum(0)
    equally_KB1 = (asked_KB / asked_KB.sum(0))[..., None]
    weights_KBY = torch.where(total_BY > 0, kept_KBY / total_BY.clamp_min(1e-30), equally_KB1)
    rows: dict[int, Tensor | slice] = {k: row.nonzero().squeeze(1) for k, row in enumerate(asked_KB) if row.any()}
    return Routing(rows, weights_KBY, asked_KB.float().mean().item())

"""Loss on the synthetic images against loss on real test images.

Shapes: M images, J patches of each that are seen, E numbers in a patch, Y classes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from ..distillation.distil import seen
from ..inversion.pool import Pool
from ..vit.tokens import forward_cls

BATCH = 256  # images that a model is asked about at once


class Shown(NamedTuple):
    """Images by which a model's class token can be judged."""

    patches: Tensor  # (M, J, E)
    positions: Tensor  # (M, J)
    labels: Tensor  # (M,)

    @classmethod
    def of(cls, pool: Pool) -> "Shown":
        return cls(seen(pool, torch.arange(len(pool), device=pool.patches.device)), pool.positions, pool.targets)

    @torch.no_grad()
    def logits(self, vit: VisionTransformer) -> Tensor:
        """(M, Y)."""
        batches = zip(self.patches.split(BATCH), self.positions.split(BATCH), strict=True)
        return torch.cat([forward_cls(vit, *batch).logits for batch in batches])

    def losses(self, vit: VisionTransformer) -> Tensor:
        """Cross-entropy of each image (M,)."""
        return F.cross_entropy(self.logits(vit), self.labels, reduction="none")


def gap(vit: VisionTransformer, shown: Mapping[str, Shown]) -> dict[str, dict[str, float]]:
    """Mean loss and accuracy in percent on each; `gap` is `test` less `pool`, where both are there."""
    found: dict[str, dict[str, float]] = {}
    for name, images in shown.items():
        right = (images.logits(vit).argmax(1) == images.labels).double().mean().item()
        found[name] = {"loss": images.losses(vit).mean().item(), "accuracy": 100 * right}
    if found.keys() >= {"pool", "test"}:
        found["gap"] = {name: found["test"][name] - found["pool"][name] for name in ("loss", "accuracy")}
    return found

"""The synthetic images made so far, with their labels and the teachers' cached answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import save_tensors
from ..inversion.result import Inverted
from .relabel import View


@dataclass(frozen=True)
class Pool:
    """M images (M, C, S, S), `alive` (M, N; True = optimised to the end), targets and inversion losses (M,), views."""

    images: Tensor
    alive: Tensor
    targets: Tensor
    loss: Tensor
    views: tuple[View, ...]

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def of(cls, inverted: Inverted, views: tuple[View, ...]) -> "Pool":
        return cls(inverted.images, inverted.alive, inverted.targets, inverted.loss, views)

    def save(self, path: Path) -> None:
        """Write `images`, `alive`, `targets`, `loss`, and of each view `view0.given`, `.high`, `.scores`, ..."""
        tensors = {name: getattr(self, name) for name in ("images", "alive", "targets", "loss")}
        for number, view in enumerate(self.views):
            for name in ("rows", "given", "high", "hard", "scores", "token_scores"):
                tensors[f"view{number}.{name}"] = getattr(view, name)
        save_tensors(path, tensors, {"soft": [view.soft for view in self.views]})


def join(pools: Sequence[Pool]) -> Pool:
    """One pool of all images; views of the same number are joined."""
    parts = {
        name: torch.cat([getattr(pool, name) for pool in pools]) for name in ("images", "alive", "targets", "loss")
    }
    offsets = torch.tensor([0] + [len(pool) for pool in pools]).cumsum(0)[:-1].tolist()
    views = []
    for same in zip(*(pool.views for pool in pools), strict=True):
        shifted = [replace(view, rows=view.rows + offset) for view, offset in zip(same, offsets, strict=True)]
        names = ("rows", "given", "high", "hard", "scores", "token_scores")
        views.append(
            View(**{name: torch.cat([getattr(view, name) for view in shifted]) for name in names}, soft=same[0].soft)
        )
    return Pool(**parts, views=tuple(views))

"""The synthetic images made so far, with their labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import save_tensors
from ..inversion.result import Inverted
from .relabel import View

_OF_POOL = ("images", "alive", "targets", "loss")
_OF_VIEW = ("rows", "given", "high", "hard")


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

    @property
    def patch(self) -> int:
        """Pixels along a patch's side."""
        return self.images.shape[-1] // math.isqrt(self.alive.shape[1])

    @classmethod
    def of(cls, inverted: Inverted, views: tuple[View, ...]) -> "Pool":
        return cls(inverted.images, inverted.alive, inverted.targets, inverted.loss, views)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], soft: Sequence[str]) -> "Pool":
        """Inverse of `tensors` and `soft`."""
        views = [
            View(**{name: tensors[f"view{number}.{name}"] for name in _OF_VIEW}, soft=kind)
            for number, kind in enumerate(soft)
        ]
        return cls(**{name: tensors[name] for name in _OF_POOL}, views=tuple(views))

    def tensors(self) -> dict[str, Tensor]:
        """`images`, `alive`, `targets`, `loss`, and of each view `view0.given`, `.high`, ..."""
        named = {name: getattr(self, name) for name in _OF_POOL}
        for number, view in enumerate(self.views):
            named |= {f"view{number}.{name}": getattr(view, name) for name in _OF_VIEW}
        return named

    def canvases(self) -> tuple[Tensor, Tensor]:
        """Images and targets, each canvas once: all `pri4` images of one share its pixels, in whatever order."""
        first: dict[bytes, int] = {}
        for row, image in enumerate(self.images.cpu()):
            first.setdefault(image.numpy().tobytes(), row)
        rows = list(first.values())
        return self.images[rows], self.targets[rows]

    @property
    def soft(self) -> list[str]:
        """What carries the soft labels in each view."""
        return [view.soft for view in self.views]

    def save(self, path: Path) -> None:
        """Write all `tensors`, with `soft` in the header."""
        save_tensors(path, self.tensors(), {"soft": self.soft})


def join(pools: Sequence[Pool]) -> Pool:
    """One pool of all images; views of the same number are joined."""
    parts = {name: torch.cat([getattr(pool, name) for pool in pools]) for name in _OF_POOL}
    offsets = torch.tensor([0] + [len(pool) for pool in pools]).cumsum(0)[:-1].tolist()
    views = []
    for same in zip(*(pool.views for pool in pools), strict=True):
        shifted = [replace(view, rows=view.rows + offset) for view, offset in zip(same, offsets, strict=True)]
        joined = {name: torch.cat([getattr(view, name) for view in shifted]) for name in _OF_VIEW}
        views.append(View(**joined, soft=same[0].soft))
    return Pool(**parts, views=tuple(views))

"""Synthetic images, as the patches that were optimised, with what is known of each patch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..common.errors import RunError
from ..common.files import save_tensors
from ..vit.tokens import unpatchify


@dataclass(frozen=True)
class Pool:
    """M synthetic images of N patches. What was optimised is what is here: no mask is computed again."""

    patches: Tensor  # (M, N, E) whole images, normalised, halted patches included
    positions: Tensor  # (M, J) of the patches that student and teachers see: all N, or, for `pri4`, a rebirth's share
    dense: Tensor  # (M, J), True = the patch at `positions` has high information density
    alive: Tensor  # (M, N), True = the patch was optimised to the image's end; False = halted, or of a sibling image
    targets: Tensor  # (M,) the classes asked for: the pseudo-labels
    loss: Tensor  # (M,) the inversion loss of each image; for `pri4`, of the canvas before the last step to it
    patch: int  # pixels along a patch's side

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def images(self) -> Tensor:
        """(M, C, S, S), normalised."""
        return unpatchify(self.patches, self.patch)

    def tensors(self) -> dict[str, Tensor]:
        """All but `patch`, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "patch"}

    def rows(self, chosen: Tensor) -> "Pool":
        """The chosen images: by number, or where a mask is True."""
        return Pool(**{name: tensor[chosen] for name, tensor in self.tensors().items()}, patch=self.patch)

    def canvases(self) -> "Pool":
        """Each canvas once: all `pri4` images of one share its pixels, in whatever order they are."""
        first: dict[bytes, int] = {}
        for row, patches in enumerate(self.patches.cpu()):
            first.setdefault(patches.numpy().tobytes(), row)
        return self.rows(torch.tensor(list(first.values())))

    def require_finite(self) -> Self:
        """Itself; raise RunError if its making has diverged, as it does by teachers whose answers are no numbers."""
        if not (torch.isfinite(self.patches).all() and torch.isfinite(self.loss).all()):
            raise RunError(
                "the synthetic images diverged: NaN or infinity in pixels or loss; look at the uploads "
                "(screen.mode = 'warn')"
            )
        return self

    def save(self, path: Path) -> None:
        """Write `images` and all tensors but `patches`."""
        tensors = self.tensors()
        del tensors["patches"]
        save_tensors(path, {"images": self.images, **tensors})


def join(pools: Sequence[Pool]) -> Pool:
    """The images of all pools, one after the other."""
    parts = [pool.tensors() for pool in pools]
    return Pool(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, patch=pools[0].patch)

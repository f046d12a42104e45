"""What inversion hands on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..common.errors import RunError


@dataclass(frozen=True)
class Inverted:
    """M synthetic images. What was optimised is what is returned: no mask is computed afresh.

    Attributes:
        images: (M, C, S, S), normalised.
        given: (M, J) positions of the patches that belong to the image: all N, or, for `pri4`, one rebirth's share.
        high: (M, J), True = the patch at `given` has high information density.
        alive: (M, N), True = the patch was optimised to the image's end; False = halted, or of a sibling image.
        targets: (M,) the classes asked for.
        loss: (M,) the inversion loss of each returned image; for `pri4`, of the canvas before the last step to it.
    """

    images: Tensor
    given: Tensor
    high: Tensor
    alive: Tensor
    targets: Tensor
    loss: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def require_finite(self) -> "Inverted":
        """Itself; raise RunError if its making has diverged, as it does by teachers whose answers are no numbers."""
        if not (torch.isfinite(self.images).all() and torch.isfinite(self.loss).all()):
            raise RunError(
                "the synthetic images diverged: NaN or infinity in pixels or loss; look at the uploads "
                "(screen.mode = 'warn')"
            )
        return self


def joined(parts: Sequence[Inverted]) -> Inverted:
    """The images of all parts, one after the other."""
    names = [field.name for field in fields(Inverted)]
    return Inverted(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

"""The inversion loss, image by image, so that an image does not depend on the batch it is made in.

Shapes: B images, Y classes, N patches, K of them alive, C channels, p pixels along a patch, E = C·p·p, W = p + 2.
"""

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn import functional as F

from ..vit.tokens import unpatchify

# To half of a pixel's 8 neighbours, (rows, columns); the others lie opposite.
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
TINY = 1e-12  # keeps the gradient of ‖0‖ finite: a constant image has none


def cross_entropy(scores_BY: Tensor, targets_B: Tensor) -> Tensor:
    """-log of the ensemble's probability of the target: (B,)."""
    return F.cross_entropy(scores_BY, targets_B, reduction="none")


def _squared_differences(images_BCHW: Tensor) -> Tensor:
    """Σ (x_i - x_j)² over the pairs of neighbours in each direction: (4, B)."""
    x = images_BCHW
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., :-1, :-1] - x[..., 1:, 1:],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([d.square().sum((1, 2, 3)) for d in differences])


class AliveVariation:
    """TV₂ of whole images and its gradient, at the cost of their alive patches.

    TV₂ = ‖d_h‖₂ + ‖d_v‖₂ + ‖d_↘‖₂ + ‖d_↙‖₂, the four shifted differences of SMI [C]; theirs is one norm over the batch,
    ours one for each image [M]. In each direction, with n_i neighbours of an alive pixel i, T_i their sum and H_i the
    sum of the halted ones,

        Σ over pairs (x_i - x_j)²  =  the same sum with alive pixels set to 0  +  Σ over alive i of n x² - x T - x H,

    where the first term, n and H stay as they are until the next halting; the gradient by x_i is 2 (n x_i - T_i).
    Each alive patch is seen through a window, one pixel wider at each edge, in which all its pixels' neighbours lie.
    """

    def __init__(self, canvas_BNE: Tensor, positions_BK: Tensor, patch: int) -> None:
        """Alive are the patches at `positions_BK`; the others rest as they are on the canvas."""
        self.patch, self.channels = patch, canvas_BNE.shape[2] // patch**2
        alive_BN = torch.zeros_like(canvas_BNE[..., 0]).scatter(1, positions_BK, 1)
        halted = unpatchify(canvas_BNE * (1 - alive_BN[..., None]), patch)  # (B, C, S, S), 0 = alive
        self.rest_4B = _squared_differences(halted)
        self.windows_BKCWW = _windows(halted, positions_BK, patch).contiguous()
        inside = _windows(torch.ones_like(halted[:, :1]), positions_BK, patch)
        self.neighbours = [self._around(inside, *towards).flatten(1) for towards in DIRECTIONS]
        self.halted = [self._around(self.windows_BKCWW, *towards).flatten(1) for towards in DIRECTIONS]
        self.sources, self.places = self._alive_borders(positions_BK, canvas_BNE.shape[1])

    def __call__(self, alive_BKE: Tensor) -> tuple[Tensor, Tensor]:
        """TV₂ (B,), and its gradient by the alive patches (B, K, E)."""
        x = alive_BKE.detach().unflatten(2, (self.channels, self.patch, self.patch))
        windows = self.windows_BKCWW
        windows[..., 1:-1, 1:-1] = x
        windows.view(-1)[self.places] = x.reshape(-1)[self.sources]
        flat, squares = x.flatten(1), x.square().sum(2).flatten(1)
        value_B, slope, pull = x.new_zeros(len(x)), torch.zeros_like(squares), torch.zeros_like(x)
        for towards, rest_B, n, halted in zip(DIRECTIONS, self.rest_4B, self.neighbours, self.halted, strict=True):
            around = self._around(windows, *towards)
            sum_B = rest_B + vecdot(n, squares) - vecdot(flat, around.flatten(1)) - vecdot(flat, halted)
            norm_B = (sum_B.clamp_min(0) + TINY).sqrt()
            value_B += norm_B
            slope.addcdiv_(n, norm_B[:, None])
            pull.addcdiv_(around, norm_B[:, None, None, None, None])
        gradient = slope.view_as(x[:, :, :1]) * x - pull
        return value_B, gradient.flatten(2)

    def _around(self, windows: Tensor, rows: int, columns: int) -> Tensor:
        """Of each pixel, the sum of its two neighbours along a direction; what is outside the image is 0."""

        def seen(y: int, x: int) -> Tensor:
            return windows[..., 1 + y : 1 + y + self.patch, 1 + x : 1 + x + self.patch]

        return seen(rows, columns) + seen(-rows, -columns)

    def _alive_borders(self, positions_BK: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
        """Pixels on a window's border that belong to another alive patch: where they come from, and where they go.

        Flat indices into (B, K, C, p, p) and (B, K, C, W, W).
        """
        (batch, alive), area = positions_BK.shape, self.patch**2
        slots_BN = torch.full((batch, num_patches), -1, device=positions_BK.device)
        slots_BN = slots_BN.scatter(1, positions_BK, torch.arange(alive, device=positions_BK.device).expand(batch, -1))
        pixels = torch.arange(area, device=positions_BK.device)
        own = torch.where(
            slots_BN[..., None] < 0, -1, slots_BN[..., None] * area * self.channels + pixels
        )  # (B, N, p·p)
        source = _windows(unpatchify(own.double() + 1, self.patch), positions_BK, self.patch).long() - 1
        source[..., 1:-1, 1:-1] = -1  # the patch itself
        image, window, _, row, column = (source >= 0).nonzero(as_tuple=True)
        channel = torch.arange(self.channels, device=positions_BK.device)[:, None]
        sources = image * alive * self.channels * area + source[source >= 0] + channel * area
        width = self.patch + 2
        places = (((image * alive + window) * self.channels + channel) * width + row) * width + column
        return sources.flatten(), places.flatten()


def _windows(images_BCHW: Tensor, positions_BK: Tensor, patch: int) -> Tensor:
    """The chosen patches with a border of one pixel, 0 outside the image: (B, K, C, W, W)."""
    batch, channels, side, _ = images_BCHW.shape
    grid, width, line = side // patch, patch + 2, side + 2
    corner_BK1 = ((positions_BK // grid * line + positions_BK % grid) * patch)[..., None]
    inner = torch.arange(width, device=positions_BK.device)
    pixels = (corner_BK1 + (inner[:, None] * line + inner).flatten()).flatten(1)  # (B, K·W·W)
    seen = F.pad(images_BCHW, (1, 1, 1, 1)).flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))
    return seen.view(batch, channels, -1, width, width).transpose(1, 2)

"""One batch of images under optimisation, of which ever fewer patches are alive.

Shapes: B images, N patches, K alive patches, E numbers in a patch, g patches along a side.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..common import outside
from ..common.errors import ConfigError
from ..config import InversionConfig
from ..ensemble.ensemble import Ensemble
from ..ensemble.routing import route
from ..vit.tokens import all_positions, patchify, put, random_flip, take, unpatchify
from .objective import AliveVariation, cross_entropy
from .pool import Pool

TV = 1e-4  # weight of the total variation prior, as SMI [C]

# (alive patches (B, K, E)) -> what is added to the loss (B,), and its gradient by the patches
Prior = Callable[[Tensor], tuple[Tensor, Tensor]]
# (canvas (B, N, E), positions of the alive patches (B, K), a patch's side in pixels) -> the prior until more are halted
MakePrior = Callable[[Tensor, Tensor, int], Prior]

OnStep = Callable[[float, float], None]  # (mean loss, alive share), once per step


def total_variation(canvas_BNE: Tensor, positions_BK: Tensor, patch: int) -> Prior:
    """`TV` · TV₂ of whole images [C]."""
    variation = AliveVariation(canvas_BNE, positions_BK, patch)

    def prior(alive_BKE: Tensor) -> tuple[Tensor, Tensor]:
        variation_B, slope_BKE = variation(alive_BKE)
        return TV * variation_B, TV * slope_BKE

    return prior


def of_images(function: Callable[[Tensor], Tensor], canvas_BNE: Tensor, positions_BK: Tensor, patch: int) -> Prior:
    """Any function of whole normalised images, (B, C, S, S) -> (B,), whose gradient autograd finds."""

    def prior(alive_BKE: Tensor) -> tuple[Tensor, Tensor]:
        leaf_BKE = alive_BKE.detach().requires_grad_()
        with torch.enable_grad():
            loss_B = function(unpatchify(put(canvas_BNE, positions_BK, leaf_BKE), patch))
        (slope_BKE,) = torch.autograd.grad(loss_B.sum(), leaf_BKE)
        return loss_B.detach(), slope_BKE

    return prior


PRIORS: Mapping[str, MakePrior] = {"tv": total_variation}


def prior_named(name: str) -> MakePrior:
    """Of `PRIORS`, or the function `prior` of a file outside the package."""
    if name in PRIORS:
        return PRIORS[name]
    function = getattr(outside.load(name, "priors", "inversion.prior"), "prior", None)
    if not callable(function):
        raise ConfigError(f"inversion.prior = {name!r} has no function prior(images); write one")
    return partial(of_images, function)


class Trajectory:
    """Pixels (B, N, E) on a canvas; teachers, prior and Adam see the alive ones only, so halted pixels cannot move."""

    def __init__(
        self,
        ensemble: Ensemble,
        start_BCHW: Tensor,
        targets_B: Tensor,
        config: InversionConfig,
        limits: tuple[Tensor, Tensor],
        flip: bool,
        rng: torch.Generator,
        lr: float,
        on_step: OnStep | None = None,
    ) -> None:
        """Start from `start_BCHW`; `limits` are the least and greatest normalised value of each channel, (C,)."""
        self.ensemble, self.targets_B = ensemble, targets_B
        self.routing, self.make_prior = route(ensemble.weights, targets_B, config.route), prior_named(config.prior)
        self.flip, self.rng, self.lr, self.on_step, self.done = flip, rng, lr, on_step, 0
        self.grid, self.patch = ensemble.grid, ensemble.patch
        pixels_each = self.patch**2
        self.low_E, self.high_E = (limit.repeat_interleave(pixels_each) for limit in limits)
        self.canvas_BNE = patchify(start_BCHW, self.patch).clamp(self.low_E, self.high_E)
        self.positions_BK = all_positions(self.canvas_BNE)
        self._optimise(self.canvas_BNE)

    def _optimise(self, patches_BKE: Tensor) -> None:
        # Adam's fused step reads pixels and gradients in the order of memory: both must be contiguous.
        self.alive_BKE = patches_BKE.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        self.adam = torch.optim.Adam([self.alive_BKE], lr=self.lr, betas=(0.5, 0.99), fused=True)
        self.prior = self.make_prior(self.canvas_BNE, self.positions_BK, self.patch)

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of Adam. Returns the losses (B,) and the alive patches (B, K, E) before it: they belong together."""
        before_BKE = self.alive_BKE.detach().clone()
        patches, positions = self.alive_BKE, self.positions_BK
        if self.flip:
            patches, positions = random_flip(patches, positions, self.grid, self.patch, self.rng)

        def loss(scores_BY: Tensor, _: Tensor) -> Tensor:
            return cross_entropy(scores_BY, self.targets_B)

        loss_B, gradient = self.ensemble.slope(loss, patches, positions, self.routing)
        (gradient_BKE,) = torch.autograd.grad(patches, self.alive_BKE, gradient)
        prior_B, slope_BKE = self.prior(before_BKE)
        loss_B = loss_B + prior_B
        self.alive_BKE.grad = (gradient_BKE + slope_BKE).contiguous()
        self.adam.step()
        with torch.no_grad():
            self.alive_BKE.clamp_(self.low_E, self.high_E)
        self.done += 1
        if self.on_step:
            self.on_step(loss_B.mean().item(), self.positions_BK.shape[1] / self.canvas_BNE.shape[1])
        return loss_B, before_BKE

    def importance(self) -> Tensor:
        """Of each alive patch, on the image as it is: (B, K)."""
        alive_BKE = self.alive_BKE.detach()
        return self.ensemble.importance(alive_BKE, self.positions_BK, self.targets_B, self.routing)

    def keep(self, ids_keep_BJ: Tensor) -> None:
        """Go on with the alive patches `ids_keep_BJ` only; the others stay on the canvas as they are."""
        self.write(self.alive_BKE.detach())
        moments = self.adam.state[self.alive_BKE]
        self.positions_BK = take(self.positions_BK, ids_keep_BJ)
        self._optimise(take(self.alive_BKE.detach(), ids_keep_BJ))
        if moments:  # Adam's memory of the kept pixels goes on
            kept = {name: take(moments[name], ids_keep_BJ) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[self.alive_BKE] = {"step": moments["step"].clone(), **kept}

    def write(self, patches_BKE: Tensor) -> None:
        """Put the alive patches onto the canvas."""
        self.canvas_BNE = put(self.canvas_BNE, self.positions_BK, patches_BKE)

    def settle(self, patches_BKE: Tensor) -> None:
        """End with these alive patches, on the canvas and for `importance`."""
        self.write(patches_BKE)
        self.alive_BKE = patches_BKE

    def alive_mask(self) -> Tensor:
        """(B, N), True = alive."""
        halted = torch.zeros(self.canvas_BNE.shape[:2], dtype=torch.bool, device=self.canvas_BNE.device)
        return halted.scatter(1, self.positions_BK, True)

    def pool(self, positions_BJ: Tensor, dense_BJ: Tensor, loss_B: Tensor) -> Pool:
        """The canvases as finished images, one of each."""
        return Pool(self.canvas_BNE, positions_BJ, dense_BJ, self.alive_mask(), self.targets_B, loss_B, self.patch)

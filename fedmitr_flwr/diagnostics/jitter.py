"""Noise of the input gradient: how much the gradient by the pixels changes when what is shown hardly does.

Shapes: B images, N patches, K of them seen, E numbers in a patch, R jitters of one kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..data.images import value_range
from ..ensemble.ensemble import Ensemble
from ..ensemble.routing import everyone
from ..inversion.invert import PIXELS, alive_counts, halting_steps
from ..inversion.objective import cross_entropy
from ..inversion.trajectory import Trajectory
from ..vit.tokens import all_positions, patchify, put, take, unpatchify

SIGMA = 0.1  # of the noise, in units of normalised pixels
SHARES = (0.0, 0.1, 0.2, 0.5, 1.0)  # of the steps of inversion, at which noise is measured

# (patches (B, K, E), positions (B, K)) -> the gradient of each image's loss by its patches
Slope = Callable[[Tensor, Tensor], Tensor]


class Jitter(NamedTuple):
    """One change of all images alike."""

    flip: bool = False
    roll: tuple[int, int] = (0, 0)  # pixels down and right, around the edges, as SMI's [C]
    noise: Tensor | float = 0.0  # added to the images (B, C, S, S)

    def there(self, images_BCHW: Tensor) -> Tensor:
        moved = (images_BCHW + self.noise).roll(self.roll, (2, 3))
        return moved.flip(3) if self.flip else moved

    def back(self, gradient_BCHW: Tensor) -> Tensor:
        """The gradient by the images before the change, of that by the images after it."""
        moved = gradient_BCHW.flip(3) if self.flip else gradient_BCHW
        return moved.roll((-self.roll[0], -self.roll[1]), (2, 3))


def jitters(images_BCHW: Tensor, draws: int, flips: bool, rng: torch.Generator) -> dict[str, list[Jitter]]:
    """So many draws of each kind; a mirror image only where one keeps its class."""
    most = max(1, images_BCHW.shape[-1] // 8)
    rolls = torch.randint(-most, most + 1, (draws, 2), generator=rng).tolist()
    noises = SIGMA * torch.randn(draws, *images_BCHW.shape, generator=rng).to(images_BCHW)
    kinds = {
        "roll": [Jitter(roll=(down, right)) for down, right in rolls],
        "noise": [Jitter(noise=noise) for noise in noises],
    }
    return kinds | ({"flip": [Jitter(), Jitter(flip=True)]} if flips else {})


def noise_and_power(
    slope: Slope, canvas_BNE: Tensor, positions_BK: Tensor, changes: Sequence[Jitter], patch: int
) -> tuple[Tensor, Tensor]:
    """Of each patch (B, N), over the jitters: the gradient's variance, and its mean square, summed over E.

    Patches that are not at `positions_BK` are not seen and do not move: both are 0 for them.
    """
    grid = round(canvas_BNE.shape[1] ** 0.5)
    columns = positions_BK % grid
    seen = torch.zeros_like(canvas_BNE[..., :1]).scatter(1, positions_BK[..., None], 1)
    gradients = []
    for change in changes:
        positions = positions_BK - columns + grid - 1 - columns if change.flip else positions_BK
        shown = patchify(change.there(unpatchify(canvas_BNE, patch)), patch)
        found = put(torch.zeros_like(canvas_BNE), positions, slope(take(shown, positions), positions))
        gradients.append(seen * patchify(change.back(unpatchify(found, patch)), patch))
    all_RBNE = torch.stack(gradients)
    return all_RBNE.var(0, correction=0).sum(-1), all_RBNE.square().mean(0).sum(-1)


def on_the_way(
    ensemble: Ensemble, config: Config, mode: str, starts: Tensor, targets_B: Tensor, rng: torch.Generator
) -> dict[int, tuple[Tensor, Tensor]]:
    """By step of a `dense` or `sparse` inversion: canvas (B, N, E) and positions of the alive patches (B, K)."""
    inversion = config.inversion
    measured = {round(share * inversion.steps) for share in SHARES}
    low, high = (end.to(starts) for end in value_range(config.model))
    run = Trajectory(ensemble, starts, targets_B, inversion, (low, high), config.data.flips, rng, PIXELS.lr)
    counts = alive_counts(run.positions_BK.shape[1], inversion)[1:]
    halts = dict(zip(halting_steps(inversion), counts, strict=True)) if mode == "sparse" else {}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(inversion.steps + 1):
        if step in halts:
            run.keep(run.importance().topk(halts[step]).indices)
        if step in measured:
            run.write(run.alive_BKE.detach())
            found[step] = run.canvas_BNE, run.positions_BK
        if step < inversion.steps:
            run.step()
    return found


def input_noise(
    ensemble: Ensemble, config: Config, starts: Tensor, targets_B: Tensor, draws: int, rng: torch.Generator
) -> dict[str, object]:
    """Noise by kind of jitter, way of inversion, and step, of patches that `sparse` keeps to the end or halts.

    `dense` and `sparse` are two inversions from the same starts; `sparse seen whole` are the images of the second with
    halted patches shown to the teachers, too. `noise` is the mean variance of a patch's gradient, `share` the part of
    the mean square that it is, which does not depend on how long gradients are.
    """
    state = rng.get_state()
    ways: dict[str, Mapping[int, tuple[Tensor, Tensor]]] = {}
    for mode in ("dense", "sparse"):
        rng.set_state(state)
        ways[mode] = on_the_way(ensemble, config, mode, starts, targets_B, rng)
    ways["sparse seen whole"] = {step: (canvas, all_positions(canvas)) for step, (canvas, _) in ways["sparse"].items()}
    canvas, last = ways["sparse"][config.inversion.steps]
    alive_BN = torch.zeros(canvas.shape[:2], dtype=torch.bool, device=canvas.device).scatter(1, last, True)

    def slope(patches_BKE: Tensor, positions_BK: Tensor) -> Tensor:
        def loss(scores_BY: Tensor, _: Tensor) -> Tensor:
            return cross_entropy(scores_BY, targets_B)

        return ensemble.slope(loss, patches_BKE, positions_BK, everyone(ensemble.weights))[1]

    found: dict[str, object] = {"steps": list(ways["dense"])}
    for kind, changes in jitters(starts, draws, config.data.flips, rng).items():
        of = {
            way: [noise_and_power(slope, *images, changes, ensemble.patch) for images in by_step.values()]
            for way, by_step in ways.items()
        }
        found[kind] = {way: _by_group(by_step, alive_BN) for way, by_step in of.items()}
    return found


def _by_group(by_step: Sequence[tuple[Tensor, Tensor]], alive_BN: Tensor) -> dict[str, dict[str, list[float]]]:
    """Not a number, which JSON has as null: there is no such patch, or none that is seen."""
    return {
        name: {
            "noise": [noise_BN[group].mean().item() for noise_BN, _ in by_step],
            "share": [(noise_BN[group].sum() / power_BN[group].sum()).item() for noise_BN, power_BN in by_step],
        }
        for name, group in {"alive": alive_BN, "halted": ~alive_BN}.items()
    }

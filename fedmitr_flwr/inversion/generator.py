"""Images from a small generator that is trained against the ensemble: what DENSE and Co-Boosting share.

Shapes: B images, Z latent numbers, C channels, S pixels along a side, N patches, E numbers in a patch, Y classes.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..common.compute import whole_float32
from ..common.rng import seeded_init
from ..config import Config, ModelConfig
from ..ensemble.ensemble import Ensemble
from ..ensemble.routing import route
from ..vit.names import normalisation
from ..vit.tokens import all_positions, forward_cls, patchify, unpatchify
from .invert import in_halves
from .pool import Pool
from .trajectory import OnStep

# (the ensemble's scores (B, Y), the student's logits (B, Y), targets (B,)) -> loss of each image (B,)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of the papers' code [C].
STEPS = 30  # of the generator, for each batch of images
LR = 1e-3
LATENT = 256  # numbers that an image is made from
WIDTH = 64  # channels before the last layer

COARSEST = 8  # pixels along a side, at most, before anything is doubled


class Generator(nn.Module):
    """Latent numbers (B, Z) -> normalised images (B, C, S, S), every value one that a picture can have.

    A linear layer makes a coarse grid of 2 · `WIDTH` channels, which is doubled until it has S pixels along a side:
    twice at least, so that 32 pixels come from 8, as in the papers' code [C]; the count for other sizes is ours [M].
    What is too wide is cut off.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        doublings = max(2, math.ceil(math.log2(model.img_size / COARSEST)))
        self.size = model.img_size
        self.coarse = math.ceil(model.img_size / 2**doublings)
        self.start = nn.Linear(LATENT, 2 * WIDTH * self.coarse**2)
        channels = [2 * WIDTH] * doublings + [WIDTH]
        self.stages = nn.Sequential(*(_stage(*pair) for pair in pairwise(channels)))
        self.end = nn.Conv2d(WIDTH, model.in_chans, 3, padding=1)
        mean, std = normalisation(model)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, latents_BZ: Tensor) -> Tensor:
        grid = self.start(latents_BZ).unflatten(1, (-1, self.coarse, self.coarse))
        pixels = self.end(self.stages(grid)[..., : self.size, : self.size]).sigmoid()  # 0..1
        normalised: Tensor = (pixels - self.mean) / self.std
        return normalised


def _stage(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.BatchNorm2d(channels_out),
        nn.LeakyReLU(0.2),
    )


def generate(
    ensemble: Ensemble,
    student: VisionTransformer,
    config: Config,
    loss: Loss,
    targets_B: Tensor,
    rng: torch.Generator,
    on_step: OnStep | None = None,
) -> Pool:
    """Make images with a fresh generator, trained `STEPS` steps for just these targets; every patch is dense.

    Each image has latent numbers z ~ N(0, 1) of its own, the same at every step; the generator's weights are optimised
    (Adam, 0.5 and 0.999 [C]). Of all steps, the images with the lowest mean loss are given back. As in the papers' code
    the generator starts anew for each batch; there z is optimised too, which moves it by 0.03 at most, and is left out.
    Routing is that of `config.inversion`. A batch too large for the memory is made in two halves.

    Raises:
        RunError: the images diverged.
    """
    device = ensemble.weights.device

    def attempt(latents_BZ: Tensor, targets_B: Tensor) -> Pool:
        with seeded_init(rng.initial_seed(), "generator"):
            generator = Generator(config.model).to(device)
        latents_BZ, targets_B = latents_BZ.to(device), targets_B.to(device)
        routing = route(ensemble.weights, targets_B, config.inversion.route)
        adam = torch.optim.Adam(generator.parameters(), lr=LR, betas=(0.5, 0.999))
        best, kept_BNE, losses_B = math.inf, torch.empty(0), torch.empty(0)
        for _ in range(STEPS):
            made = generator(latents_BZ)
            patches = patchify(made.detach(), ensemble.patch)
            positions = all_positions(patches)

            def objective(scores_BY: Tensor, patches_BNE: Tensor, positions: Tensor = positions) -> Tensor:
                return loss(scores_BY, forward_cls(student, patches_BNE, positions).logits, targets_B)

            loss_B, gradient_BNE = ensemble.slope(objective, patches, positions, routing)
            mean = loss_B.mean().item()
            if mean < best or not len(kept_BNE):
                best, kept_BNE, losses_B = mean, patches, loss_B
            adam.zero_grad()
            made.backward(unpatchify(gradient_BNE, ensemble.patch) / len(targets_B))
            adam.step()
            if on_step:
                on_step(mean, 1.0)
        every = torch.ones(patches.shape[:2], dtype=torch.bool, device=device)
        return Pool(kept_BNE, positions, every, every, targets_B, losses_B, ensemble.patch)

    latents = torch.randn(len(targets_B), LATENT, generator=rng)
    with whole_float32():
        return in_halves(attempt, latents, targets_B, rng).require_finite()

"""Co-Boosting: hard images and the ensemble's weights improve each other, then distillation (Dai et al., ICLR 2024).

In each round, with A the ensemble and g the student:

1. Generator G: minimises (1 - p_y) CE(A(x), y) - λ τ² KL(softmax(A(x)/τ) ‖ softmax(g(x)/τ)) over x = G(z), with p_y
   the ensemble's probability of y as a constant, λ = 1, and τ = 3 [C].
2. Weights: w <- clip(w - μ dᵉ sign(dCE/dw), 0, 1) after each batch of one pass over all images so far, used as w / Σ w;
   μ = 0.01, d = 0.99 [C]: `ensemble/learned.py`.
3. Student: x moves by ε sign(∇ₓ uᵀ softmax(A(x)/T)), u ~ U(-1, 1)^Y, anew for each batch (output diversification,
   Tashiro et al. 2020), ε = 8 of 255 grey levels; then T² KL(softmax(A/T) ‖ softmax(g/T)) of the class token on it,
   T = 4 [C].

Other than in the paper:

- Transformers have no batch normalisation; the paper's code has a term for it, with weight 0.
- Moved images are clipped to what a picture can hold, and weights are learned on the round's own images as well, so
  that a run of one round learns them too [M].
- Images, epochs, optimiser and the student's start are `distill.*`, as for FedMITR; one generator makes
  `inversion.batch-size` images at once. Images are not cropped at random, but flipped where `data.flip`.
- The ensemble is `ensemble.*`, whose weights say where learning starts; the paper's is combine = "logits", weights =
  "uniform". `estimated` and `learned` start by size.
"""

from functools import partial

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..config import Config, ModelConfig
from ..data.images import value_range
from ..distillation.distil import Plain
from ..distillation.losses import soft_divergence
from ..ensemble.ensemble import Ensemble
from ..ensemble.routing import everyone
from ..inversion import generator
from ..inversion.objective import cross_entropy
from ..inversion.scout import Weigher
from ..vit.names import normalisation
from .contract import Fused, Job
from .rounds import Rounds, generated, rival_settings

TEMPERATURE = 4.0  # T
ADVERSARIAL_TEMPERATURE = 3.0  # τ
PERTURB = 8.0  # ε, of 255 grey levels

settings = rival_settings
UNREAD = ("inversion.steps", "inversion.stops", "inversion.prior")


def check(config: Config) -> None:
    """Its weights tell teachers apart, but not classes, so images cannot be routed by them."""
    if config.inversion.route:
        raise ConfigError(
            f"inversion.route = {config.inversion.route} needs weights that tell classes apart, and method = "
            "'coboosting' learns one for each teacher; set inversion.route = 0"
        )


def fuse(job: Job) -> Fused:
    """Make hard images, weigh the teachers by them, distil on harder ones; in each round, on a pool that grows."""
    config = job.config
    teachers = Weigher(job.uploads, config, job.device, teach=config.ensemble.combine, learns=True)
    rounds = Rounds(job, generator.STEPS, "generation", by_student=True)
    distillation = Plain(TEMPERATURE, partial(diversify, model=config.model))
    for r in rounds:
        make = partial(generated, teachers.ensemble, rounds.student, config, loss=hard_loss)
        rounds.images(r, teachers.ensemble, make)
        rounds.weigh(r, teachers)
        rounds.distil(r, teachers.ensemble, distillation)
    return rounds.fused(teachers.ensemble)


def hard_loss(scores_BY: Tensor, student_BY: Tensor, targets_B: Tensor) -> Tensor:
    """(1 - p_y) · CE - KL of each image (B,)."""
    entropy_B = cross_entropy(scores_BY, targets_B)
    hardness_B = 1 - (-entropy_B.detach()).exp()
    return hardness_B * entropy_B - soft_divergence(scores_BY, student_BY, ADVERSARIAL_TEMPERATURE)


def diversify(
    ensemble: Ensemble, patches_BNE: Tensor, positions_BN: Tensor, rng: torch.Generator, model: ModelConfig
) -> Tensor:
    """The patches (B, N, E), moved to where the ensemble's answer turns in a random direction of each image's own."""
    area, sizes_C = model.patch_size**2, PERTURB / 255 / normalisation(model)[1]
    step_E, low_E, high_E = (
        each.repeat_interleave(area).to(patches_BNE.device) for each in (sizes_C, *value_range(model))
    )
    directions_BY = 2 * torch.rand(len(patches_BNE), model.num_classes, generator=rng) - 1
    directions_BY = directions_BY.to(patches_BNE.device)

    def turned(scores_BY: Tensor, _: Tensor) -> Tensor:
        return (directions_BY * (scores_BY / TEMPERATURE).softmax(-1)).sum(-1)

    _, gradient_BNE = ensemble.slope(turned, patches_BNE, positions_BN, everyone(ensemble.weights))
    return (patches_BNE + step_E * gradient_BNE.sign()).clamp(low_E, high_E)

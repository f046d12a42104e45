"""Co-Boosting: hard images and the ensemble's weights improve each other, then distillation (Dai et al., ICLR 2024).

In each of the E epochs, with A the ensemble and g the student:

1. Generator G: minimises (1 - p_y)ʰ CE(A(x), y) - λ τ² KL(softmax(A(x)/τ) ‖ softmax(g(x)/τ)) over x = G(z), with p_y
   the ensemble's probability of y as a constant, h = `rival.hard` = 1, λ = `rival.adversarial` = 1, and τ = 3 [C].
2. Weights: w <- clip(w - μ dᵉ sign(dCE/dw), 0, 1) after each batch of one pass over all images so far, used as w / Σ w;
   μ = `ensemble.learn-step` = 0.01, d = `ensemble.learn-decay` = 0.99 [C]: `ensemble/learned.py`.
3. Student: x moves by ε sign(∇ₓ uᵀ softmax(A(x)/T)), u ~ U(-1, 1)^Y, anew for each batch (output diversification,
   Tashiro et al. 2020), ε = `rival.perturb` = 8 of 255 grey levels; then T² KL(softmax(A/T) ‖ softmax(g/T)) of the
   class token on it, T = `rival.temperature` = 4 [C].

Other than in the paper:

- Transformers have no batch normalisation; the paper's code has a term for it, with weight 0.
- Moved images are clipped to what a picture can hold, and weights are learned on the epoch's own images as well, so
  that a run of one epoch learns them too [M].
- Images, passes, optimiser and the student's start are `distill.*`, as for FedMITR; one generator makes
  `inversion.batch-size` images at once. Images are not cropped at random, but flipped where `data.flip`.
- The ensemble is `ensemble.*`, whose weights say where learning starts; the paper's is combine = "logits", weights =
  "uniform". `estimated` and `learned` start by size.
"""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..common.errors import ConfigError
from ..config import Config
from ..data.images import value_range
from ..distillation.losses import soft_divergence
from ..distillation.start import require_start
from ..ensemble.ensemble import Ensemble
from ..ensemble.routing import everyone
from ..inversion.generator import generate
from ..inversion.objective import cross_entropy
from ..inversion.result import Inverted
from ..inversion.trajectory import OnStep
from ..vit.names import normalisation
from .contract import Fused, Job
from .loop import Recipe, grow, plain

ADVERSARIAL_TEMPERATURE = 3.0  # τ


def check(config: Config) -> None:
    """Its weights tell teachers apart, but not classes, so images cannot be routed by them."""
    require_start(config)
    if config.inversion.route:
        raise ConfigError(
            f"inversion.route = {config.inversion.route} needs weights that tell classes apart, and method = "
            "'coboosting' learns one for each teacher; set inversion.route = 0"
        )


def settings(config: Config) -> Config:
    """Those of the rivals; where images are perturbed, teachers must see it."""
    again: dict[str, object] = {"distill.teachers": "again"} if config.rival.perturb else {}
    return Config.from_flat(again, base=plain(config))


def fuse(job: Job) -> Fused:
    """Make hard images, weigh the teachers by them, distil on harder ones; E times, on a pool that grows."""
    rival = job.config.rival
    perturb = partial(diversify, config=job.config) if rival.perturb else None
    by_student = bool(rival.adversarial)
    recipe = Recipe(
        make, rival.steps, by_student=by_student, learns=True, perturb=perturb, stage="generation", rate="rival.lr"
    )
    return grow(job, recipe)


def make(
    ensemble: Ensemble,
    student: VisionTransformer,
    targets: Tensor,
    config: Config,
    rng: torch.Generator,
    on_step: OnStep,
) -> Inverted:
    """One batch of images."""
    loss = partial(hard_loss, weight=config.rival.adversarial, hard=config.rival.hard)
    return generate(ensemble, student, targets, config, loss, rng=rng, on_step=on_step)


def hard_loss(scores_BY: Tensor, student_BY: Tensor, targets_B: Tensor, weight: float, hard: float) -> Tensor:
    """(1 - p_y)^hard · CE - weight · KL of each image (B,)."""
    entropy_B = cross_entropy(scores_BY, targets_B)
    hardness_B = (1 - (-entropy_B.detach()).exp()) ** hard
    return hardness_B * entropy_B - weight * soft_divergence(scores_BY, student_BY, ADVERSARIAL_TEMPERATURE)


def diversify(
    ensemble: Ensemble, patches_BNE: Tensor, positions_BN: Tensor, rng: torch.Generator, config: Config
) -> Tensor:
    """The patches (B, N, E), moved to where the ensemble's answer turns in a random direction of each image's own."""
    rival, area = config.rival, config.model.patch_size**2
    sizes_C = rival.perturb / 255 / normalisation(config.model)[1]
    step_E, low_E, high_E = (
        each.repeat_interleave(area).to(patches_BNE.device) for each in (sizes_C, *value_range(config.model))
    )
    directions_BY = 2 * torch.rand(len(patches_BNE), config.model.num_classes, generator=rng) - 1
    directions_BY = directions_BY.to(patches_BNE.device)

    def turned(scores_BY: Tensor, _: Tensor) -> Tensor:
        return (directions_BY * (scores_BY / rival.temperature).softmax(-1)).sum(-1)

    _, gradient_BNE = ensemble.slope(turned, patches_BNE, positions_BN, everyone(ensemble.weights))
    return (patches_BNE + step_E * gradient_BNE.sign()).clamp(low_E, high_E)

"""Co-Boosting: hard images and the ensemble's weights improve each other, then distillation (Dai et al., ICLR 2024).

In each round, with A the ensemble and g the student:

1. Generator G: minimises (1 - p_y) CE(A(x), y) - λ τ² KL(softmax(A(x)/τ) ‖ softmax(g(x)/τ)) over x = G(z), with p_y
   the ensemble's probability of y as a constant, λ = 1, and τ = 3 [C].
2. Weights: w <- clip(w - μ dᵉ sign(dCE/dw), 0, 1) after each batch of one pass over all images so far, used as w / Σ w;
   μ = 0.01, d = 0.99 [C].
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
  "uniform". `estimated` starts by size.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.errors import ConfigError
from ..common.rng import stream
from ..config import Config, ModelConfig
from ..data.images import value_range
from ..distillation.distil import Plain
from ..distillation.losses import soft_divergence
from ..ensemble.ensemble import Ensemble, combine_answers, log_probabilities
from ..ensemble.routing import everyone
from ..inversion import generator
from ..inversion.objective import cross_entropy
from ..inversion.scout import Weigher
from ..vit.names import normalisation
from .contract import Fused, Job
from .rounds import Rounds, rival_settings

TEMPERATURE = 4.0  # T
ADVERSARIAL_TEMPERATURE = 3.0  # τ
PERTURB = 8.0  # ε, of 255 grey levels
# Of the weights: Co-Boosting's code [C].
STEP = 0.01  # μ: how far a weight moves in the first round
DECAY = 0.99  # d, of the step, per round
BATCH = 128  # images that a step sees

FLAT = 1e-9  # a slope below this is rounding, whose sign would move weights that make no difference
TINY = 1e-300  # where only a teacher without weight names a class: its slope is steep, and finite


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
    teachers = Weigher(job.uploads, config, job.device, teach=config.ensemble.combine)
    ensemble = teachers.ensemble
    weights_K = ensemble.weights.mean(1)  # not normalised
    rounds = Rounds(job, teachers, generator.STEPS, "generation", by_student=True)
    distillation = Plain(TEMPERATURE, partial(diversify, model=config.model))
    for r in rounds:
        pool = rounds.images(r, partial(generator.generate, ensemble, rounds.student, config, hard_loss))
        answers, rng = ensemble.answers(pool.images), stream(config.seed, "weights", r)
        weights_K = learn(answers, pool.targets, weights_K, ensemble.combine, r, rng)
        ensemble.weights = (weights_K / weights_K.sum()).to(ensemble.weights)[:, None].repeat(1, answers.shape[2])
        job.log(stage="weights", round=r, weights=ensemble.weights[:, 0])
        rounds.distil(r, distillation)
    return rounds.fused()


def hard_loss(scores_BY: Tensor, student_BY: Tensor, targets_B: Tensor) -> Tensor:
    """(1 - p_y) · CE - KL of each image (B,)."""
    entropy_B = cross_entropy(scores_BY, targets_B)
    hardness_B = 1 - (-entropy_B.detach()).exp()
    return hardness_B * entropy_B - soft_divergence(scores_BY, student_BY, ADVERSARIAL_TEMPERATURE)


def learn(
    logits_KMY: Tensor, targets_M: Tensor, weights_K: Tensor, combine: str, r: int, rng: torch.Generator
) -> Tensor:
    """Pass over the images once, in random batches; after each one, every weight moves by a step against its slope.

    w <- clip(w - μ dᵉ · sign(dCE/dw), 0, 1), with CE of the ensemble whose weights are w / Σ w. One weight for each
    teacher, whatever the class, as in the paper. That rounding errors do not count is ours [M].

    `logits_KMY` are answers on the images, made once: the teachers do not change. `weights_K`, to start from, are in
    0..1 and not all 0. `r` is the round, from 0, and `rng` of the images' order.

    Returns:
        The new weights (K,) in 0..1, not normalised, float64 on the CPU: it is little work, with equal bits anywhere.
    """
    logits, targets, weights = logits_KMY.cpu().double(), targets_M.cpu(), weights_K.cpu().double()
    step = STEP * DECAY**r
    for chosen in torch.randperm(len(targets), generator=rng).split(BATCH):
        weights = moved(weights, slope(logits[:, chosen], targets[chosen], weights, combine), step)
    return weights


def slope(logits_KBY: Tensor, targets_B: Tensor, weights_K: Tensor, combine: str) -> Tensor:
    """dCE/dw (K,) of the mean cross-entropy of the ensemble with the weights w / Σ w."""
    free_K = weights_K.detach().requires_grad_()
    shares_K1 = (free_K / free_K.sum())[:, None]
    with torch.enable_grad():
        if combine == "probs":  # not by log w, whose slope is infinite where w = 0
            scores_BY = _log_mixture(log_probabilities(logits_KBY), shares_K1)
        else:
            scores_BY = combine_answers(logits_KBY, shares_K1.expand(-1, logits_KBY.shape[2]), combine)
        loss = F.cross_entropy(scores_BY, targets_B)
    (slope_K,) = torch.autograd.grad(loss, free_K)
    return slope_K


def moved(weights_K: Tensor, slope_K: Tensor, step: float) -> Tensor:
    """One signed step, clipped; weights that would all be 0 stay as they are."""
    signs_K = slope_K.sign() * (slope_K.abs() > FLAT)
    new_K = (weights_K - step * signs_K).clamp(0, 1)
    return new_K if new_K.sum() > 0 else weights_K


def _log_mixture(log_KBY: Tensor, shares_K1: Tensor) -> Tensor:
    """Of what is mixed, log Σ w exp: (B, Y)."""
    top_BY = log_KBY.max(0).values
    mixed_BY = (shares_K1[..., None] * (log_KBY - top_BY).exp()).sum(0)
    return (mixed_BY + TINY).log() + top_BY


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

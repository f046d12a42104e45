"""DENSE: images of a generator that seeks the ensemble's boundary, then distillation (Zhang et al., NeurIPS 2022).

- Generator G: minimises CE(A(x), y) - λ ω KL(A(x) ‖ g(x)) over x = G(z), with A the ensemble, g the student and ω = 1
  where their classes differ, else 0: images between the two decision boundaries [C]; λ = `rival.adversarial` = 1.
- Student: T² KL(softmax(A(x)/T) ‖ softmax(g(x)/T)) of the class token on all images so far, T = `rival.temperature` = 4
  [C].

Other than in the paper:

- Transformers have no batch normalisation, so the term of feature statistics (L_BN) is missing.
- Images, passes, optimiser and the student's start are `distill.*`, as for FedMITR; one generator makes
  `inversion.batch-size` images at once, `rival.steps` = 30 steps [C]. Images are not cropped at random, but flipped
  where `data.flip`.
- The ensemble is `ensemble.*`; the paper's is combine = "logits", weights = "uniform".
"""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Config
from ..distillation.losses import soft_divergence
from ..distillation.start import require_start
from ..ensemble.ensemble import Ensemble
from ..inversion.generator import generate
from ..inversion.objective import cross_entropy
from ..inversion.result import Inverted
from ..inversion.trajectory import OnStep
from .contract import Fused, Job
from .loop import Recipe, grow, plain

check = require_start
settings = plain


def fuse(job: Job) -> Fused:
    """Train a generator, make images, distil; E times, on a pool that grows."""
    rival = job.config.rival
    recipe = Recipe(make, rival.steps, by_student=bool(rival.adversarial), stage="generation", rate="rival.lr")
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
    loss = partial(boundary_loss, weight=config.rival.adversarial)
    return generate(ensemble, student, targets, config, loss, rng=rng, on_step=on_step)


def boundary_loss(scores_BY: Tensor, student_BY: Tensor, targets_B: Tensor, weight: float) -> Tensor:
    """CE - weight · ω · KL of each image (B,); ω masks, True = ensemble and student name different classes."""
    differ_B = scores_BY.argmax(1) != student_BY.argmax(1)
    apart_B = soft_divergence(scores_BY, student_BY, 1.0)
    return cross_entropy(scores_BY, targets_B) - weight * differ_B * apart_B

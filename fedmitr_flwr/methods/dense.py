"""DENSE: images of a generator that seeks the ensemble's boundary, then distillation (Zhang et al., NeurIPS 2022).

- Generator G: minimises CE(A(x), y) - λ ω KL(A(x) ‖ g(x)) over x = G(z), with A the ensemble, g the student and ω = 1
  where their classes differ, else 0: images between the two decision boundaries, and λ = 1 [C].
- Student: T² KL(softmax(A(x)/T) ‖ softmax(g(x)/T)) of the class token on all images so far, T = 4 [C].

Other than in the paper:

- Transformers have no batch normalisation, so the term of feature statistics (L_BN) is missing.
- Images, epochs, optimiser and the student's start are `distill.*`, as for FedMITR; one generator makes
  `inversion.batch-size` images at once, in 30 steps [C]. Images are not cropped at random, but flipped
  where `data.flip`.
- The ensemble is `ensemble.*`; the paper's is combine = "logits", weights = "uniform".
"""

from functools import partial

from torch import Tensor

from ..distillation.distil import Plain
from ..distillation.losses import soft_divergence
from ..inversion import generator
from ..inversion.objective import cross_entropy
from ..inversion.scout import Weigher
from .contract import Fused, Job
from .rounds import Rounds, rival_settings

TEMPERATURE = 4.0  # T

settings = rival_settings
UNREAD = ("inversion.steps", "inversion.stops", "inversion.prior")


def fuse(job: Job) -> Fused:
    """Train a generator, make images, distil; in each round, on a pool that grows."""
    config = job.config
    teachers = Weigher(job.uploads, config, job.device, teach=config.ensemble.combine)
    rounds = Rounds(job, teachers, generator.STEPS, "generation", by_student=True)
    rounds.scout()
    for r in rounds:
        rounds.images(r, partial(generator.generate, teachers.ensemble, rounds.student, config, boundary_loss))
        rounds.weigh()
        rounds.distil(r, Plain(TEMPERATURE))
    return rounds.fused()


def boundary_loss(scores_BY: Tensor, student_BY: Tensor, targets_B: Tensor) -> Tensor:
    """CE - ω · KL of each image (B,); ω masks, True = ensemble and student name different classes."""
    differ_B = scores_BY.argmax(1) != student_BY.argmax(1)
    return cross_entropy(scores_BY, targets_B) - differ_B * soft_divergence(scores_BY, student_BY, 1.0)

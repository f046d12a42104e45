"""F-ADI: dense inversion of the ensemble, then plain distillation (DeepInversion, Yin et al. 2020, of K models).

A rival in one-shot federated learning since DENSE (Zhang et al. 2022), where it is called Fed-ADI.

- Images: pixels x ~ N(0, 1) minimise CE(A(x), y) + tv · TV₂(x), every patch to the end, Adam's learning rate 0.25:
  `inversion/invert.py`, as for FedMITR with `inversion.mode = "dense"` [C].
- Student: T² KL(softmax(A(x)/T) ‖ softmax(g(x)/T)) of the class token, T = 4 [C].

Other than in the papers:

- Transformers have no batch normalisation, so DeepInversion's main prior, the statistics of the features, is missing.
- The competition term (Jensen-Shannon, "adaptive") is left out, as in SMI.
- Budget, optimiser and the student's start are `distill.*`, the pixels' steps `inversion.steps`, the ensemble is
  `ensemble.*`, all as for FedMITR; the papers' ensemble is combine = "logits", weights = "uniform".
"""

from functools import partial

from ..distillation.distil import Plain
from ..inversion.invert import Pixels
from ..inversion.scout import Weigher
from ..inversion.starts import noise
from .contract import Fused, Job
from .fedmitr import synthesise
from .rounds import Rounds, rival_settings

TEMPERATURE = 4.0  # T
PIXELS = Pixels(lr=0.25, start=noise)

settings = rival_settings
UNREAD = ("inversion.stops",)


def fuse(job: Job) -> Fused:
    """Invert dense images, distil; in each round, on a pool that grows."""
    config = job.config
    teachers = Weigher(job.uploads, config, job.device, teach=config.ensemble.combine)
    rounds = Rounds(job, teachers, config.inversion.steps)
    rounds.scout(PIXELS)
    for r in rounds:
        rounds.images(r, partial(synthesise, teachers.ensemble, config, pixels=PIXELS))
        rounds.weigh()
        rounds.distil(r, Plain(TEMPERATURE))
    return rounds.fused()

"""F-ADI: dense inversion of the ensemble, then plain distillation (DeepInversion, Yin et al. 2020, of K models).

A rival in one-shot federated learning since DENSE (Zhang et al. 2022), where it is called Fed-ADI.

- Images: pixels x ~ N(0, 1) minimise CE(A(x), y) + tv · TV₂(x), every patch to the end, Adam's learning rate 0.25:
  `inversion/invert.py`, as for FedMITR with `inversion.mode = "dense"` [C].
- Student: T² KL(softmax(A(x)/T) ‖ softmax(g(x)/T)) of the class token, T = `rival.temperature` = 4 [C].

Other than in the papers:

- Transformers have no batch normalisation, so DeepInversion's main prior, the statistics of the features, is missing.
- The competition term (Jensen-Shannon, "adaptive") is `inversion.disagree`, off by default as in SMI.
- Budget, optimiser and the student's start are `distill.*`, the pixels' steps `inversion.steps`, the ensemble is
  `ensemble.*`, all as for FedMITR; the papers' ensemble is combine = "logits", weights = "uniform".
"""

from ..config import Config
from ..distillation.start import require_start
from . import fedmitr
from .contract import Fused, Job
from .loop import plain

check = require_start


def settings(config: Config) -> Config:
    """Dense images, nothing relabelled, nothing mixed, the class token alone."""
    published = {"inversion.mode": "dense", "inversion.start": "noise", "inversion.lr": 0.25}
    return Config.from_flat(published, base=plain(config))


def fuse(job: Job) -> Fused:
    """As FedMITR, with these settings."""
    return fedmitr.fuse(job)

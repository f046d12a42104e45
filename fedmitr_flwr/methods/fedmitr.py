"""FedMITR: sparse model inversion, token relabelling, distillation (arXiv 2605.10748).

A reconstruction: the paper's equations were not available. docs/fedmitr.md says which lines are the paper's [P], which
come from a cited method [C], and which are ours [M].
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Config
from ..distillation.start import require_start
from ..ensemble.ensemble import Ensemble
from ..inversion.invert import invert
from ..inversion.result import Inverted
from ..inversion.trajectory import OnStep
from .contract import Fused, Job
from .loop import Recipe, grow

check = require_start


def fuse(job: Job) -> Fused:
    """Generate, relabel, distil; E times, on a pool that grows."""
    inversion = job.config.inversion
    return grow(job, Recipe(make, inversion.steps, by_student=bool(inversion.disagree)))


def make(
    ensemble: Ensemble,
    student: VisionTransformer,
    targets: Tensor,
    config: Config,
    rng: torch.Generator,
    on_step: OnStep,
) -> Inverted:
    """One batch of images, by `inversion.mode`."""
    return invert(
        ensemble,
        targets,
        config.inversion,
        config.model,
        flip=config.data.flip,
        rng=rng,
        on_step=on_step,
        student=student if config.inversion.disagree else None,
    )

"""FedMITR: sparse model inversion, token relabelling, distillation (arXiv 2605.10748).

A reconstruction: the paper's equations were not available. docs/fedmitr.md says which lines are the paper's [P], which
come from a cited method [C], and which are ours [M].
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..inversion.invert import PIXELS, Pixels, invert
from ..inversion.result import Inverted
from ..inversion.trajectory import OnStep
from .contract import Fused, Job
from .loop import Recipe, grow


def fuse(job: Job) -> Fused:
    """Generate, relabel, distil; E times, on a pool that grows."""
    return grow(job, Recipe(make, job.config.inversion.steps))


def make(
    ensemble: Ensemble,
    _student: VisionTransformer,
    targets: Tensor,
    config: Config,
    rng: torch.Generator,
    on_step: OnStep,
    pixels: Pixels = PIXELS,
) -> Inverted:
    """One batch of images, by `inversion.mode`."""
    flip = config.data.flip
    return invert(ensemble, targets, config.inversion, config.model, pixels, flip=flip, rng=rng, on_step=on_step)

"""RegMean (Jin et al. 2023): each linear layer merged in closed form, by second moments of what it is given.

No image and no step. What clients upload for it, the closed form and deviations are in distillation/regmean.py.
"""

from ..distillation.regmean import regmean, require_directions
from ..vit.build import vit_of
from .contract import Fused, Job

check = require_directions


def fuse(job: Job) -> Fused:
    """Merge the uploads by their images."""
    weights = regmean(job.uploads)
    return Fused(vit_of(job.config.model, weights).to(job.device), weights)

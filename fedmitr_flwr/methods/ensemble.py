"""All teachers kept and asked together: not one model, but the line to which a distilled student is compared."""

from ..vit.ensemble import Ensemble
from .contract import Fused, Job


def fuse(job: Job) -> Fused:
    """Keep every upload; `config.ensemble` says how answers are combined."""
    return Fused(Ensemble.of(job.uploads, job.config.model, job.config.ensemble).to(job.device), None)

"""All teachers kept and asked together: not one model, but the line to which a distilled student is compared."""

from ..inversion.scout import scouted_ensemble
from .contract import Fused, Job


def fuse(job: Job) -> Fused:
    """Keep every upload; `config.ensemble` says how answers are combined."""
    ensemble = scouted_ensemble(job.uploads, job.config, job.device)
    return Fused(ensemble, None, ensemble=ensemble)

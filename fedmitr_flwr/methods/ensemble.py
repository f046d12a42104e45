"""All teachers kept and asked together: not one model, but the line to which a distilled student is compared."""

from ..common.errors import ConfigError
from ..config import Config
from ..inversion.scout import scouted_ensemble
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def check(config: Config) -> None:
    """Clients can evaluate one model, but not K that they must not see."""
    if config.evaluate.where == "clients":
        raise ConfigError(
            "method = 'ensemble' makes no single model for clients to evaluate; use evaluate.where = 'server'"
        )


def fuse(job: Job) -> Fused:
    """Keep every upload; `config.ensemble` says how answers are combined."""
    ensemble = scouted_ensemble(job.uploads, job.config, job.device)
    return Fused(ensemble, None, ensemble=ensemble)

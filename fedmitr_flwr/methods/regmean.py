"""RegMean (Jin et al. 2023): each linear layer merged in closed form, by second moments of what it is given.

No image and no step. What clients upload for it, the closed form and deviations are in merging/regmean.py.
"""

from ..common.errors import ConfigError
from ..config import Config
from ..merging.regmean import regmean
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def check(config: Config) -> None:
    """Raise ConfigError where the clients would not upload what this needs."""
    if not config.upload.moments:
        raise ConfigError(
            "method = 'regmean' needs second moments of what the clients' layers are given; "
            "set upload.extras = 'moments'"
        )


def fuse(job: Job) -> Fused:
    """Merge the uploads by their images."""
    return Fused.of_weights(regmean(job.uploads), job)

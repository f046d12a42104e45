"""One-round FedAvg (McMahan et al. 2017): the weighted mean of the uploads."""

from ..merging.average import average
from ..vit.build import vit_of
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """Average the uploads by number of images."""
    weights = average(job.uploads)
    return Fused(vit_of(job.config.model, weights).to(job.device), weights)

"""One-round FedAvg (McMahan et al. 2017): the weighted mean of the uploads."""

from ..merging.average import average
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """Average the uploads by number of images."""
    return Fused.of_weights(average(job.uploads), job)

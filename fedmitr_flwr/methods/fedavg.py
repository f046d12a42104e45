"""One-round FedAvg (McMahan et al. 2017): the weighted mean of the uploads."""

from ..training.average import average
from ..vit.build import build_vit
from .contract import Fused, Job


def fuse(job: Job) -> Fused:
    """Average the uploads by number of images."""
    weights = average(job.uploads)
    vit = build_vit(job.config.model)
    vit.load_state_dict(weights)
    return Fused(vit.to(job.device), weights)

"""WUDI (Cheng et al. 2025) in closed form: the blocks' matrices merged so that the clients interfere least.

From weights alone, without images. The equations are in merging/task_vectors.py.
"""

from ..merging.task_vectors import wudi
from ..vit.build import initial_weights, vit_of
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """Merge the clients' updates of the weights that they started from."""
    model = job.config.model
    weights = wudi(job.uploads, initial_weights(model, job.config.seed))
    return Fused(vit_of(model, weights).to(job.device), weights)

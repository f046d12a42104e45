"""WUDI (Cheng et al. 2025) in closed form: the blocks' matrices merged so that the clients interfere least.

From weights alone, without images. The equations are in merging/task_vectors.py.
"""

from ..merging.task_vectors import wudi
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """Merge the clients' updates of the weights that they started from."""
    return Fused.of_weights(wudi(job.uploads, job.start), job)

"""TSV-M (Gargiulo et al. 2025): the clients' leading singular vectors, made orthogonal to each other's.

From weights alone, without images. The equations are in merging/task_vectors.py.
"""

from ..merging.task_vectors import tsv
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """Merge the clients' updates of the weights that they started from."""
    return Fused.of_weights(tsv(job.uploads, job.start), job)

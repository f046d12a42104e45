"""Linear discriminant analysis on frozen features, from the clients' summed statistics.

Source: LDA (Fisher 1936), whose sums add up over clients exactly, as FedCGS (Guan et al. 2025) and GH-LDA use them [C].
The answer does not depend on how the images are spread over the clients.

Deviations [M]: the features are taps of the public start (`vit/taps.py`); priors are the clients' own counts; the
covariance is shrunk towards its mean variance, by Chen et al.'s formula (OAS).
"""

from ..merging.closed_form import frozen_weights, pooled, require_statistics
from ..statistics.heads import lda
from .contract import OF_IMAGES, Fused, Job

check = require_statistics

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """The public start with the head that `statistics.heads.lda` makes on its taps."""
    return Fused.of_weights(frozen_weights(job.config, lda(pooled(job.uploads))), job)

"""Ridge regression to one-hot classes on frozen features, from the clients' summed statistics.

Source: AFL (He et al., CVPR 2025) [C], whose recursive merging of the clients' solutions gives, in exact arithmetic,
the ridge solution of all images in one place; here the sums are added and solved once, which is that solution.

Deviations [M]: a bias that is not penalised. The penalty, `heads.RIDGE`, counts once and not once per client, so the
answer does not depend on how the images are spread. The scores are no log-probabilities: their softmax is too flat.
"""

from ..merging.closed_form import frozen_weights, pooled, require_statistics
from ..statistics.heads import ridge
from .contract import OF_IMAGES, Fused, Job

check = require_statistics

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """The public start with the head that `statistics.heads.ridge` makes on its taps."""
    return Fused.of_weights(frozen_weights(job.config, ridge(pooled(job.uploads))), job)

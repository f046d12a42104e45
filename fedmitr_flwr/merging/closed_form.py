"""The clients' common start with a head in closed form on its taps, alone and beside a student.

Shapes: M images, Y classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..config import Config
from ..statistics.heads import UNSEEN, Head, lda, spread
from ..statistics.moments import Statistics, total
from ..uploads.upload import Upload
from ..vit.build import Weights, initial_weights
from ..vit.taps import network_of, on_taps, side_by_side

# Of a student's answers beside those of a closed form that vary as much: on seven development cells never more than 0.3
# points below the closed form alone, where 0.3 of them is worth +4 to -4 (docs/LOG.md).
SHARE = 0.05
_BATCH = 256  # images


def require_statistics(config: Config) -> None:
    """Raise ConfigError where the clients would upload no statistics."""
    if not config.upload.statistics:
        raise ConfigError(
            f"method = {config.method!r} needs the clients' statistics, which tell class counts, too; "
            "set upload.extras = 'statistics'"
        )


def statistics_of(upload: Upload) -> Statistics:
    assert upload.statistics is not None, "upload.extras, which methods check"
    assert upload.class_counts is not None, "they come with the statistics"
    return Statistics.of(upload.statistics, upload.class_counts)


def pooled(uploads: Sequence[Upload]) -> Statistics:
    """The statistics of all clients' images."""
    return total(statistics_of(upload) for upload in uploads)


def frozen_weights(config: Config, head: Head) -> Weights:
    """A head on the features of the weights that all clients started from, as one model (`vit.taps.TapModel`)."""
    return on_taps(initial_weights(config.model, config.seed), head.weight, head.bias)


@torch.no_grad()
def beside_student(
    student: Mapping[str, Tensor], statistics: Statistics, images_MCHW: Tensor, config: Config, device: torch.device
) -> Weights:
    """One model whose scores are those of `lda` plus `SHARE` of the student's, each as parts of its own spread [M].

    The closed form's spread on the clients' images follows from their sums; on synthetic images it is twice as large,
    and the student would drown it. The student's is measured on synthetic images, which are like those it learned from.
    Both go into the heads, so that nothing is left to be done at prediction.
    """
    seen_Y, head = statistics.counts > 0, lda(statistics)
    unit = 1 / spread(Head(head.weight[seen_Y], head.bias[seen_Y]), statistics)
    frozen = frozen_weights(config, Head(unit * head.weight, torch.where(seen_Y, unit * head.bias, UNSEEN)))
    beside = network_of(config.model, student).to(device).eval()
    scores_MY = torch.cat([beside(images).cpu() for images in images_MCHW.split(_BATCH)])[:, seen_Y]
    part = SHARE / max((scores_MY - scores_MY.mean(1, keepdim=True)).std().item(), 1e-6)
    weighed = {name: part * tensor if name.startswith("head.") else tensor for name, tensor in student.items()}
    return side_by_side(frozen, weighed)

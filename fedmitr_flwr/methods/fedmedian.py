"""The coordinate-wise median of the uploads (Yin et al. 2018) [C], which fewer than half of them cannot drag away."""

import torch
from torch import Tensor

from ..uploads.updates import stacked
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def fuse(job: Job) -> Fused:
    """Every number is the median of the clients'; numbers of images do not count."""
    weights = {name: median(values).to(values.dtype) for name, values in stacked(job.uploads)}
    return Fused.of_weights(weights, job)


def median(values_K: Tensor) -> Tensor:
    """Over the first axis: the middle value, or the mean of the two middle ones."""
    low, high = (len(values_K) - 1) // 2, len(values_K) // 2
    ordered = values_K.sort(0).values
    return ordered[low] if low == high else torch.lerp(ordered[low].double(), ordered[high].double(), 0.5)

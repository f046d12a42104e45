"""TIES (Yadav et al. 2023) [P]: the clients' large updates, where they agree on the sign."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..merging.task_vectors import merged
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES
DENSITY = 0.2  # of an update's numbers, the largest, that are kept [P]


def fuse(job: Job) -> Fused:
    """Of each number, the mean of the large updates whose sign is that of their sum; all clients alike, at scale 1."""
    limits_K = torch.stack([least_kept(upload.weights, job.start) for upload in job.uploads])
    return Fused.of_weights(merged(job.uploads, job.start, lambda updates: elected_mean(updates, limits_K)), job)


def least_kept(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """The smallest magnitude, a scalar, among the `DENSITY` of an update's numbers that are largest."""
    sizes = torch.cat([(weights[name].double() - start[name].double()).abs().flatten() for name in start])
    kept = max(1, round(DENSITY * len(sizes)))
    return sizes.kthvalue(len(sizes) - kept + 1).values


def elected_mean(updates: Tensor, limits_K: Tensor) -> Tensor:
    """Over the first axis of `updates` (K, ...): the mean of those from `limits_K` up that agree in sign."""
    limits = limits_K.view(-1, *[1] * (updates.dim() - 1))
    kept = torch.where(updates.abs() >= limits, updates, 0)
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return torch.where(agree, kept, 0).sum(0) / agree.sum(0).clamp_min(1)

"""The coordinate-wise median of the uploads (Yin et al. 2018) [C], which fewer than half of them cannot drag away."""

import torch
from torch import Tensor

from ..training.updates import side_by_side
from ..vit.build import build_vit
from .contract import Fused, Job


def fuse(job: Job) -> Fused:
    """Every number is the median of the clients'; numbers of images do not count."""
    weights = {name: median(stacked).to(stacked.dtype) for name, stacked in side_by_side(job.uploads)}
    vit = build_vit(job.config.model)
    vit.load_state_dict(weights)
    return Fused(vit.to(job.device), weights)


def median(values_K: Tensor) -> Tensor:
    """Over the first axis: the middle value, or the mean of the two middle ones."""
    low, high = (len(values_K) - 1) // 2, len(values_K) // 2
    ordered = values_K.sort(0).values
    return ordered[low] if low == high else torch.lerp(ordered[low].double(), ordered[high].double(), 0.5)

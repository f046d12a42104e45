"""The weighted mean of the uploads: one-round FedAvg, and the distilled student's usual start."""

from collections.abc import Sequence

import torch

from .upload import Upload, Weights


def average(uploads: Sequence[Upload]) -> Weights:
    """Σ n_k w_k / Σ n_k (McMahan et al. 2017), summed in float64 so that equal uploads give back the upload."""
    total = sum(upload.num_examples for upload in uploads)
    mean: Weights = {}
    for name, first in uploads[0].weights.items():
        parts = (upload.weights[name].double() * (upload.num_examples / total) for upload in uploads)
        mean[name] = torch.stack(list(parts)).sum(0).to(first.dtype)
    return mean

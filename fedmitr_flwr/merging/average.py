"""The weighted mean of the uploads: one-round FedAvg, and the distilled student's usual start."""

from collections.abc import Sequence

from ..uploads.upload import Upload
from ..vit.build import Weights


def average(uploads: Sequence[Upload]) -> Weights:
    """Σ n_k w_k / Σ n_k (McMahan et al. 2017), summed in float64 so that equal uploads give back the upload.

    Only one tensor of one upload is read at a time: K uploads on disk need no more memory than one.
    """
    total = sum(upload.num_examples for upload in uploads)
    mean: Weights = {}
    for name in uploads[0].weights:
        for upload in uploads:
            tensor = upload.weights[name]
            part = tensor.double() * (upload.num_examples / total)
            mean[name] = mean[name].add_(part) if name in mean else part
        mean[name] = mean[name].to(tensor.dtype)
    return mean

"""Linear heads in closed form, from sums over features.

Shapes: n images, D numbers in a feature, Y classes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import Statistics

RIDGE = 1.0  # the penalty on squared weights, scikit-learn's default: taps are of normalised tokens, of about unit size
UNSEEN = -1e4  # score of a class without images: never the answer, and finite


class Head(NamedTuple):
    """Scores are z weightᵀ + bias; float64."""

    weight: Tensor  # (Y, D)
    bias: Tensor  # (Y,)


def lda(statistics: Statistics, shrinkage: float | None = None) -> Head:
    """Linear discriminant analysis (Fisher 1936; Rao 1948): softmax of the scores is p(y | z) of equal Gaussians.

    weight_y = Σ⁻¹ μ_y, bias_y = -½ μ_yᵀ Σ⁻¹ μ_y + log(n_y / n), with Σ = (1 - s) C + s tr(C)/D · I of the covariance
    C = scatter / n within classes; s is that of `oas` unless it is given. Where Σ is singular, its pseudo-inverse. As
    scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s) on all images.
    """
    covariance_DD = statistics.scatter / statistics.counts.sum()
    width = len(covariance_DD)
    even_DD = torch.eye(width, dtype=torch.float64) * covariance_DD.trace() / width
    shrunk_DD = torch.lerp(covariance_DD, even_DD, oas(statistics) if shrinkage is None else shrinkage)
    means_YD = statistics.means
    weight_YD = means_YD @ torch.linalg.pinv(shrunk_DD, hermitian=True)
    bias_Y = (statistics.counts / statistics.counts.sum()).log() - 0.5 * (weight_YD * means_YD).sum(1)
    return Head(weight_YD, torch.where(statistics.counts > 0, bias_Y, UNSEEN))


def oas(statistics: Statistics) -> float:
    """The share of shrinkage that is best for Gaussians, up to n: Chen et al. 2010, eq. 23, in scikit-learn's form.

    Of the covariance within classes, whose means count as known.
    """
    number = statistics.counts.sum()
    covariance_DD = statistics.scatter / number
    width = len(covariance_DD)
    mean_square, squared_mean = (covariance_DD**2).mean(), (covariance_DD.trace() / width) ** 2
    spread = (number + 1) * (mean_square - squared_mean / width)
    return min(1.0, ((mean_square + squared_mean) / spread).item()) if spread > 0 else 1.0


def ridge(statistics: Statistics, penalty: float = RIDGE) -> Head:
    """Ridge regression to one-hot classes: the minimum of Σ |z Wᵀ + b - onehot(y)|² + penalty · |W|².

    As scikit-learn's Ridge(alpha=penalty) on all images: the bias is free.
    """
    number = statistics.counts.sum()
    mean_D, shares_Y = statistics.sums.sum(0) / number, statistics.counts / number
    centred_DD = statistics.moment - number * torch.outer(mean_D, mean_D)
    centred_DY = statistics.sums.T - number * torch.outer(mean_D, shares_Y)
    ridged_DD = centred_DD + penalty * torch.eye(len(centred_DD), dtype=torch.float64)
    weight_YD = torch.linalg.solve(ridged_DD, centred_DY).T
    return Head(weight_YD, shares_Y - weight_YD @ mean_D)


def spread(head: Head, statistics: Statistics) -> float:
    """The standard deviation of a head's scores, centred over its classes, on the images that the sums are of."""
    weight_YD, bias_Y = head.weight - head.weight.mean(0), head.bias - head.bias.mean()
    total = (weight_YD @ statistics.moment * weight_YD).sum() + 2 * bias_Y @ weight_YD @ statistics.sums.sum(0)
    number = statistics.counts.sum()
    return math.sqrt(max(((total / number + bias_Y @ bias_Y) / len(bias_Y)).item(), 1e-12))

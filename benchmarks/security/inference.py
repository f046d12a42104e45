"""What can be inferred of a client's images: who was in the training, and whether images come back.

Shapes: S models, N candidates (images of which some were trained on), M synthetic images, F numbers of an image, D of a
feature.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.nn import functional

FALSE_ALARMS = 0.01  # the false positive rate at which the true positive rate is given


class Power(NamedTuple):
    """How well a score tells members from others: by chance, 50 and 1."""

    auc: float  # area under the ROC curve, in percent
    found: float  # true positive rate at a false positive rate of at most `FALSE_ALARMS`, in percent


def power(scores_N: Tensor, member_N: Tensor) -> Power:
    """Of a score that is higher for members."""
    members, scores = member_N.numpy(), scores_N.double().numpy()
    false, true, _ = roc_curve(members, scores, drop_intermediate=False)
    return Power(100 * float(roc_auc_score(members, scores)), 100 * float(np.max(true[false <= FALSE_ALARMS])))


def confidence(logits_NY: Tensor, labels_N: Tensor) -> Tensor:
    """log(p / (1 - p)) of each image's own class (N,): near to normal (Carlini et al. 2022, section V-B)."""
    logits = logits_NY.double()
    own = functional.one_hot(labels_N, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)


def likelihood_ratio(confidence_N: Tensor, shadows_SN: Tensor, member_SN: Tensor) -> Tensor:
    """LiRA (Carlini et al. 2022, algorithm 1): log p(confidence | trained on it) - log p(confidence | not) (N,).

    Both are normal: the means are each image's own over the shadow models with and without it; with as few models as
    here, the two variances are those of all images together (their section VI-C).
    """
    ratio_N = torch.zeros(len(confidence_N), dtype=torch.float64)
    for sign, inside_SN in ((1, member_SN), (-1, ~member_SN)):
        number_N = inside_SN.sum(0)
        assert (number_N >= 1).all(), "an image needs shadow models with it and without it"
        mean_N = (shadows_SN * inside_SN).sum(0) / number_N
        squares_SN = (shadows_SN - mean_N).square() * inside_SN
        variance = (squares_SN.sum() / (number_N - 1).sum().clamp_min(1)).clamp_min(1e-12)
        ratio_N += sign * -0.5 * ((confidence_N - mean_N).square() / variance + variance.log())
    return ratio_N


def halves(models: int, candidates: int, rng: torch.Generator) -> Tensor:
    """Which model is trained on which candidate (S, N): each on half of the models, S even."""
    order_SN = torch.rand(models, candidates, generator=rng).argsort(0)
    return order_SN < models // 2


def leverage(features_ND: Tensor, moment_DD: Tensor) -> Tensor:
    """zᵀ G⁻¹ z of each feature z (N,), G being the uploaded second moment: members have at most 1.

    With fewer images than features, G has no inverse and any z beyond its span is infinitely far: a share of 1e-6 of
    its trace, which is above what float32 rounds off, is added to its diagonal.
    """
    ridge = 1e-6 * moment_DD.trace() / len(moment_DD)
    regular_DD = moment_DD.double() + ridge * torch.eye(len(moment_DD), dtype=torch.float64)
    return (features_ND.double() * torch.linalg.solve(regular_DD, features_ND.double().T).T).sum(1)


def nearest(images_NF: Tensor, others_MF: Tensor) -> Tensor:
    """The distance of each image to the nearest of the others (N,)."""
    return torch.cdist(images_NF, others_MF).min(1).values


def returned(synthetic_MF: Tensor, members_NF: Tensor, unseen_NF: Tensor) -> float:
    """Of how many synthetic images the nearest real one was trained on, in percent; 50 if they remember nothing.

    As many images that nobody trained on stand beside the members, of the same classes.
    """
    assert len(members_NF) == len(unseen_NF), "with more of one kind, chance is not 50"
    own_M, other_M = nearest(synthetic_MF, members_NF), nearest(synthetic_MF, unseen_NF)
    return 100 * ((own_M < other_M).double() + 0.5 * (own_M == other_M)).mean().item()

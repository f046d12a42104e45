"""Unusual statistics: sums of frozen features that contradict those of the other clients.

What is no sum of features at all is refused when it arrives (`statistics.moments.problem`). The rest is compared with
the others' [M]. Two numbers tell, whatever classes a client has, and whatever share of them:

- All features of one public model have much in common, of whatever images they are: how far a client's mean feature
  reaches along the others'. Features that are turned around reach as far back, sums of zeros nowhere.
- The others' statistics give a classifier, linear discriminant analysis, without this client: what it says of the
  mean feature of each of the client's classes. As with answers (`answers.Names`), it counts what share of the classes
  that it separates it calls by the client's names. Each class of each other client is a reference of its own, and the
  nearest decides: one liar among the others cannot make an honest client wrong that agrees with a third.

Shapes: K uploads, D numbers in a feature, Y classes, R references (one for each other client and class), C classes that
are compared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..merging.closed_form import statistics_of
from ..statistics.moments import Statistics
from ..uploads.upload import Upload
from .answers import Names
from .findings import Finding
from .weights import FEWEST

REACH = 0.5, 2.0  # of a client's mean feature along the others'; 1: as far
CLEAR_REACH = 0.25, 4.0
NAMED = 0.5  # of `Names.kept`
CLEAR_NAMED = 0.25

IMAGES = 20  # of a class, for a client's mean to be a reference
COMPARED = 0.5  # of a client's images, in classes that two others have: below it nothing is said
SEPARABLE = 0.1  # of `Names.gain`: below it the classes cannot be separated
SHRINKAGE = 0.5  # of the covariance within classes: few images of many numbers


def strange_sums(uploads: Sequence[Upload]) -> list[Finding]:
    """Of each upload, what is unusual in its statistics. The worst is set aside first: it misleads about the others."""
    left = list(uploads)
    found: list[Finding] = []
    for look in (_by_reach, _by_names):
        while len(left) >= FEWEST and (worst := look(left)):
            found.append(worst)
            left = [upload for upload in left if upload.client != worst.client]
    return found


def _by_reach(uploads: Sequence[Upload]) -> Finding | None:
    reaches_K = reaches([statistics_of(upload) for upload in uploads])
    worst = int((reaches_K - 1).abs().argmax())
    reach = reaches_K[worst].item()
    if REACH[0] <= reach <= REACH[1]:
        return None
    text = f"the mean of its features reaches {reach:.2f} times as far as the others': "
    text += "are they of its images, and of these model.weights?"
    return Finding(uploads[worst].client, "sums", reach, text, clear=not CLEAR_REACH[0] <= reach <= CLEAR_REACH[1])


def _by_names(uploads: Sequence[Upload]) -> Finding | None:
    every = [statistics_of(upload) for upload in uploads]
    names_of = [named([*every[:k], *every[k + 1 :]], statistics) for k, statistics in enumerate(every)]
    judged = [(names.kept, k) for k, names in enumerate(names_of) if names and names.gain > SEPARABLE]
    if not judged or min(judged)[0] >= NAMED:
        return None
    kept, worst = min(judged)
    text = (
        f"of what the others' statistics see in its classes, {100 * max(0.0, kept):.0f} % have its names: permuted "
        "labels? compare its class list with the others'"
    )
    return Finding(uploads[worst].client, "sums", kept, text, clear=kept < CLEAR_NAMED)


def reaches(every: Sequence[Statistics]) -> Tensor:
    """How far each client's mean feature reaches along the middle one (their median, number by number): (K,)."""
    means_KD = torch.stack([each.sums.sum(0) / each.counts.sum() for each in every])
    middle_D = means_KD.quantile(0.5, dim=0)
    reaches_K: Tensor = means_KD @ middle_D / middle_D.square().sum().clamp_min(1e-300)
    return reaches_K


def named(others: Sequence[Statistics], own: Statistics) -> Names | None:
    """What the others' statistics call the means of a client's classes; None: too few classes can be compared.

    A class is compared if two others have enough images of it. The distance of two means is Mahalanobis', less what the
    reference's own scatter adds to it; that of a class is its nearest reference's.
    """
    enough_RY = torch.stack([other.counts >= IMAGES for other in others])
    classes_C = (enough_RY.sum(0) >= 2).nonzero().squeeze(1)
    compared_C = own.counts[classes_C] > 0
    images = own.counts[classes_C].sum()
    if len(classes_C) < 2 or images.item() < max(IMAGES / 2, COMPARED * own.counts.sum().item()):
        return None
    inverse_DD, spread = _precision(others)
    means_ND = own.means[classes_C][compared_C]
    nearest = []
    for label in classes_C.tolist():
        having = [other for other in others if other.counts[label] >= IMAGES]
        away_RND = torch.stack([other.means[label] for other in having])[:, None] - means_ND
        scatter_R1 = spread / torch.stack([other.counts[label] for other in having])[:, None]
        nearest.append(((away_RND @ inverse_DD * away_RND).sum(2) - scatter_R1).amin(0))
    answers_NC = (-torch.stack(nearest, 1) / 2).softmax(1)
    targets_N = compared_C.nonzero().squeeze(1)
    return Names.of(answers_NC, targets_N, own.counts[classes_C][compared_C] / images)


def _precision(others: Sequence[Statistics]) -> tuple[Tensor, float]:
    """The inverse of the covariance within classes, shrunk, and the squared length that one image's feature has by it.

    Each client counts as much as any other: it shall not buy a say by its number of images.
    """
    covariance_DD = torch.stack([other.scatter / other.counts.sum() for other in others]).mean(0)
    width = len(covariance_DD)
    even_DD = torch.eye(width, dtype=torch.float64) * covariance_DD.trace() / width
    inverse_DD = torch.linalg.pinv(torch.lerp(covariance_DD, even_DD, SHRINKAGE), hermitian=True)
    return inverse_DD, (inverse_DD * covariance_DD).sum().item()

"""Which teacher knows which class: weights by class without class counts, from answers on synthetic images [M].

Shapes: K teachers, M images, Y classes.
"""

import torch
from torch import Tensor

SHARPNESS = 3.0  # γ; 2 to 4 are alike on the development seeds, below that teachers that do not know a class count
MIN_MARGIN = 0.3  # required drop in p(y) on images of other classes, relative to competence; 0.05 to 0.5 are alike
SHARES = 20  # mixtures that are tried between the weights by size and the most that the evidence allows


def estimate(probabilities_KMY: Tensor, sizes_K: Tensor, targets_M: Tensor) -> Tensor:
    """The weight (K, Y) of each teacher for each class; each column sums to 1.

    w_ky = (1 - λ) n_k / Σ_j n_j + λ n_k c_ky^γ / Σ_j n_j c_jy^γ, with c_ky the teacher's `competence` r_ky, less where
    it does not tell the class from others (`tells_apart`). λ is the largest share up to the `evidence` ρ with which the
    mixture Σ_k w_ky p_k(y|x) gets no fewer images right than by size: a hard test while the images are those of the
    ensemble weighted by size, which they favour.

    Equal teachers, an empty pool and classes without an image are weighted by size. The probabilities are each
    teacher's softmax on whole images, made for the classes `targets_M`: noise has none, and misleads.
    """
    answers_KMY = probabilities_KMY.float()
    shares_K1 = (sizes_K / sizes_K.sum()).to(answers_KMY)[:, None]
    by_size_KY = shares_K1.expand(-1, answers_KMY.shape[2])
    images_Y = torch.bincount(targets_M, minlength=answers_KMY.shape[2])
    competence_KY = competence(answers_KMY, shares_K1, targets_M)
    knows_KY = competence_KY * tells_apart(answers_KMY, competence_KY, targets_M)
    best_Y = knows_KY.max(0).values
    sharp_KY = shares_K1 * (knows_KY / best_Y.clamp_min(1e-30)) ** SHARPNESS
    by_competence_KY = torch.where(best_Y > 0, sharp_KY / sharp_KY.sum(0).clamp_min(1e-30), by_size_KY)
    limit = evidence(competence_KY, shares_K1, images_Y)
    share = limit * _harmless(answers_KMY, by_size_KY, torch.lerp(by_size_KY, by_competence_KY, limit), targets_M)
    return torch.lerp(by_size_KY, by_competence_KY, share)


def competence(probabilities_KMY: Tensor, shares_K1: Tensor, targets_M: Tensor) -> Tensor:
    """The mean r (K, Y) of p_k(y|x) over the images made for y, and over one more that has the teachers' mean.

    That one image keeps few images from saying much. `shares_K1` are the clients' shares of all images. Without an
    image of a class, 0.
    """
    images_Y = torch.bincount(targets_M, minlength=probabilities_KMY.shape[2])
    total_KY = _said_of_own(probabilities_KMY, targets_M)
    mean_Y = (shares_K1 * total_KY).sum(0) / images_Y.clamp_min(1)
    return (total_KY + mean_Y) / (images_Y + 1)


def tells_apart(probabilities_KMY: Tensor, competence_KY: Tensor, targets_M: Tensor) -> Tensor:
    """In 0..1, (K, Y): 0 for a teacher that says y of all images alike, 1 where p(y) is `MIN_MARGIN` lower on others.

    A client of one class is sure of it whatever it sees. By competence alone it would have the class to itself, and the
    ensemble would see that class everywhere (docs/LOG.md).
    """
    images_Y = torch.bincount(targets_M, minlength=probabilities_KMY.shape[2])
    elsewhere_KY = (probabilities_KMY.sum(1) - _said_of_own(probabilities_KMY, targets_M)) / (
        len(targets_M) - images_Y
    ).clamp_min(1)
    return ((competence_KY - elsewhere_KY) / (MIN_MARGIN * competence_KY).clamp_min(1e-30)).clamp(0, 1)


def _said_of_own(probabilities_KMY: Tensor, targets_M: Tensor) -> Tensor:
    """The sum (K, Y) of p_k(y|x) over the images made for y."""
    own_KM = probabilities_KMY[:, torch.arange(len(targets_M), device=targets_M.device), targets_M]
    return torch.zeros_like(probabilities_KMY.sum(1)).index_add_(1, targets_M, own_KM)


def evidence(competence_KY: Tensor, shares_K1: Tensor, images_Y: Tensor) -> Tensor:
    """ρ in 0..1, a scalar: how much of "is y seen in an image of y?" is decided by who is asked.

    The variance between the teachers, less what so few images give by chance, over the variance of all answers (the
    form of Wright's F_ST). 0: the teachers agree, as under IID data; 1: each class is known to some and not to others.
    """
    mean_Y = (shares_K1 * competence_KY).sum(0)
    between_Y = (shares_K1 * (competence_KY - mean_Y) ** 2).sum(0)
    chance_KY = shares_K1 * (1 - shares_K1) * competence_KY * (1 - competence_KY) / (images_Y + 1)
    every = (mean_Y * (1 - mean_Y)).sum()
    return ((between_Y.sum() - chance_KY.sum()) / every.clamp_min(1e-30)).clamp(0, 1)


def _harmless(probabilities_KMY: Tensor, before_KY: Tensor, after_KY: Tensor, targets_M: Tensor) -> float:
    """The largest share, 0..1, of the way from the one weights to the others that gets no fewer images right."""
    before_MY, after_MY = ((weights[:, None] * probabilities_KMY).sum(0) for weights in (before_KY, after_KY))
    shares = [step / SHARES for step in range(SHARES + 1)]
    right = [int((torch.lerp(before_MY, after_MY, share).argmax(1) == targets_M).sum()) for share in shares]
    return max(share for share, count in zip(shares, right, strict=True) if count >= right[0])

"""Strange uploads, by their weights: an update that is too long or too short, points away, is a copy, or owns all.

Robust z-scores [C]: distance from the median over clients, in units of the median absolute deviation. All that follows
from them here is ours [M]; the numbers were chosen on development seeds (docs/adr/0017).

Shapes: K uploads.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..training.updates import gram
from ..training.upload import Upload
from .findings import Finding

FEWEST = 3  # uploads; of two that differ nobody can tell which one is strange

NORM_Z = 5.0
NORM_SPREAD = 0.25  # least deviation of the log of a norm, lest clients that are nearly equal make each other strange
AWAY = -0.02  # mean cosine with the others' updates; honest ones are on the other side of 0
COPY = 0.9999  # cosine of two updates
OWNS = 10.0  # times the images of all others together

_NORMAL = 1.4826  # the deviation of a normal distribution, in units of its median absolute deviation


def strange_weights(uploads: Sequence[Upload], initial: Mapping[str, Tensor]) -> list[Finding]:
    """Of each upload, what is strange in `upload - initial` and in its number of images."""
    found = list(_owners(uploads))
    products_KK = gram(uploads, initial)
    norms_K = products_KK.diag().clamp_min(0).sqrt()
    units_KK = products_KK / (norms_K[:, None] * norms_K).clamp_min(1e-300)
    found += _copies(uploads, units_KK)
    if len(uploads) >= FEWEST:
        found += _norms(uploads, norms_K)
        found += _directions(uploads, units_KK)
    return found


def robust_z(values_K: Tensor, least_spread: float) -> Tensor:
    """Distance from the median in robust standard deviations, of which there is at least `least_spread`: (K,)."""
    away_K = values_K - values_K.quantile(0.5)
    return away_K / max(_NORMAL * away_K.abs().quantile(0.5).item(), least_spread)


def _norms(uploads: Sequence[Upload], norms_K: Tensor) -> Iterator[Finding]:
    """Strange is a length that is so both as it is and for its number of images.

    A client with n times the images makes n times the steps, and, as a random walk, √n times the way.
    """
    logs_K = norms_K.clamp_min(1e-30).log()
    sizes_K = torch.tensor([float(upload.num_examples) for upload in uploads], dtype=torch.float64)
    raw_K, sized_K = (robust_z(values_K, NORM_SPREAD) for values_K in (logs_K, logs_K - sizes_K.log() / 2))
    for upload, norm, raw, sized in zip(uploads, norms_K.tolist(), raw_K.tolist(), sized_K.tolist(), strict=True):
        if min(raw, sized) > NORM_Z or max(raw, sized) < -NORM_Z:
            middle = norms_K.quantile(0.5).item()
            text = f"its update is {norm:.3g} long, the median is {middle:.3g}; scaled, or of another local.lr?"
            yield Finding(upload.client, "norm", norm, text)


def _directions(uploads: Sequence[Upload], units_KK: Tensor) -> Iterator[Finding]:
    """Clients that start from the same weights go similar ways, even with other classes; a reversed update does not.

    The worst is set aside first: it pulls the means of the others down.
    """
    left = list(range(len(uploads)))
    while len(left) >= FEWEST:
        units = units_KK[left][:, left]
        cosines = (units.sum(1) - units.diag()) / (len(left) - 1)
        worst, cosine = int(cosines.argmin()), cosines.min().item()
        if cosine >= AWAY:
            return
        text = f"its update points away from the others' (mean cosine {cosine:.3f}): was its sign turned?"
        yield Finding(uploads[left.pop(worst)].client, "direction", cosine, text)


def _copies(uploads: Sequence[Upload], units_KK: Tensor) -> Iterator[Finding]:
    """The first of equal updates passes: what was sent twice shall count once."""
    for later, upload in enumerate(uploads):
        for earlier in range(later):
            if units_KK[earlier, later] > COPY:
                text = f"its update is that of client {uploads[earlier].client}; give every client its own images"
                yield Finding(upload.client, "copy", units_KK[earlier, later].item(), text)
                break


def _owners(uploads: Sequence[Upload]) -> Iterator[Finding]:
    total = sum(upload.num_examples for upload in uploads)
    for upload in uploads:
        others = total - upload.num_examples
        if others and upload.num_examples > OWNS * others:
            text = (
                f"it says that it has {upload.num_examples} images, all others together {others}: weighted by size, "
                "nobody else counts; set ensemble.weights = 'uniform', or lower screen.max-images"
            )
            yield Finding(upload.client, "size", upload.num_examples / others, text)

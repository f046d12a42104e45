"""Unusual uploads, by their weights: an update that is too long or too short, points away, is a copy, or owns all.

Robust z-scores [C]: distance from the median over clients, in units of the median absolute deviation. All that follows
from them here is ours [M]; the numbers were chosen on development seeds (docs/adr/0017). The limits `CLEAR_...` are of
what no honest client can be: how far honest ones stay from them is in benchmarks/results/screening/honest.json.

Shapes: K uploads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..uploads.updates import gram
from ..uploads.upload import Upload
from .findings import Finding

FEWEST = 3  # uploads; of two that differ either may be the unusual one

NORM_Z = 5.0
NORM_SPREAD = 0.25  # least deviation of the log of a norm, lest clients that are nearly equal make each other unusual
AWAY = -0.02  # mean cosine with the others' updates; after much training honest ones are on the other side of 0
COPY = 0.9999  # cosine of two updates
OWNS = 10.0  # times the images of all others together: more do not count

CLEAR_LENGTH = 2.5  # logarithm of a length's ratio to the median: 12 times
CLEAR_AWAY = -0.3  # a few steps on a few images of one or two classes: honest clients were at -0.12
CLEAR_OWNS = 1000.0
CLEAR_NEW = 0.03  # cosine of an upload's matrices with the start's; 0 for weights of another draw
MANY = 10_000  # weights in matrices: with fewer, another draw's cosine may be above that by chance

_NORMAL = 1.4826  # the deviation of a normal distribution, in units of its median absolute deviation


@dataclass(frozen=True, eq=False)
class Measured:
    """What is looked at in the updates `upload - initial`; float64."""

    norms: Tensor  # (K,) lengths
    raw: Tensor  # (K,) logarithm of the length's ratio to the median
    # (K,) the same of the length per root of the number of images: a client with n times the images makes n times the
    # steps and, as a random walk, √n times the way
    sized: Tensor
    cosines: Tensor  # (K, K) of each pair of updates
    kept: Tensor | None  # (K,) cosine of all matrices but the head's with the start's; None: there are too few weights
    owned: Tensor  # (K,) number of images, in units of what all others have together

    @classmethod
    def of(cls, uploads: Sequence[Upload], initial: Mapping[str, Tensor]) -> "Measured":
        products_KK = gram(uploads, initial)
        norms_K = products_KK.diag().clamp_min(0).sqrt()
        cosines_KK = products_KK / (norms_K[:, None] * norms_K).clamp_min(1e-300)
        logs_K = norms_K.clamp_min(1e-30).log()
        sizes_K = torch.tensor([float(upload.num_examples) for upload in uploads], dtype=torch.float64)
        raw_K, sized_K = (values_K - values_K.quantile(0.5) for values_K in (logs_K, logs_K - sizes_K.log() / 2))
        owned_K = sizes_K / (sizes_K.sum() - sizes_K)
        return cls(norms_K, raw_K, sized_K, cosines_KK, _kept(uploads, initial), owned_K)

    @property
    def away(self) -> Tensor:
        """(K,) the smaller of `raw` and `sized`; 0 where one is above 0 and the other below."""
        return _agreed(self.raw, self.sized)


def strange_weights(uploads: Sequence[Upload], initial: Mapping[str, Tensor]) -> list[Finding]:
    """Of each upload, what is unusual in `upload - initial` and in its number of images."""
    measured = Measured.of(uploads, initial)
    found = [*_owners(uploads, measured.owned), *_copies(uploads, measured.cosines)]
    if len(uploads) >= FEWEST:
        found += _norms(uploads, measured)
        found += _directions(uploads, measured.cosines)
    if measured.kept is not None:
        found += _of_another_draw(uploads, measured.kept)
    return found


def robust_z(values_K: Tensor, least_spread: float) -> Tensor:
    """Distance from the median in robust standard deviations, of which there is at least `least_spread`: (K,)."""
    away_K = values_K - values_K.quantile(0.5)
    return away_K / max(_NORMAL * away_K.abs().quantile(0.5).item(), least_spread)


def _agreed(one_K: Tensor, other_K: Tensor) -> Tensor:
    least_K = torch.minimum(one_K.abs(), other_K.abs())
    return torch.where(one_K.sign() == other_K.sign(), one_K.sign() * least_K, 0.0)


def _kept(uploads: Sequence[Upload], initial: Mapping[str, Tensor]) -> Tensor | None:
    matrices = [name for name, start in initial.items() if start.dim() > 1 and not name.startswith("head.")]
    if sum(initial[name].numel() for name in matrices) < MANY:
        return None
    square, squares_K, products_K = 0.0, torch.zeros(len(uploads)).double(), torch.zeros(len(uploads)).double()
    for name in matrices:
        start_P = initial[name].double().flatten()
        weights_KP = torch.stack([upload.weights[name].double().flatten() for upload in uploads])
        square += start_P.square().sum().item()
        squares_K += weights_KP.square().sum(1)
        products_K += weights_KP @ start_P
    return products_K / (squares_K * square).sqrt().clamp_min(1e-300)


def _norms(uploads: Sequence[Upload], measured: Measured) -> Iterator[Finding]:
    """Unusual is a length that is so both as it is and for its number of images."""
    z_K = _agreed(robust_z(measured.raw, NORM_SPREAD), robust_z(measured.sized, NORM_SPREAD))
    middle = measured.norms.quantile(0.5).item()
    for k, upload in enumerate(uploads):
        norm, away = measured.norms[k].item(), measured.away[k].item()
        if abs(z_K[k].item()) > NORM_Z:
            text = f"its update is {norm:.3g} long, the median is {middle:.3g}; scaled, or of another local.lr?"
            yield Finding(upload.client, "norm", norm, text, clear=abs(away) > CLEAR_LENGTH)


def _directions(uploads: Sequence[Upload], cosines_KK: Tensor) -> Iterator[Finding]:
    """Clients that start from the same weights go similar ways, even with other classes; a reversed update does not.

    The worst is set aside first: it pulls the means of the others down.
    """
    left = list(range(len(uploads)))
    while len(left) >= FEWEST:
        means = mean_cosines(cosines_KK[left][:, left])
        worst, cosine = int(means.argmin()), means.min().item()
        if cosine >= AWAY:
            return
        text = f"its update points away from the others' (mean cosine {cosine:.3f}): was its sign turned?"
        yield Finding(uploads[left.pop(worst)].client, "direction", cosine, text, clear=cosine < CLEAR_AWAY)


def mean_cosines(cosines_KK: Tensor) -> Tensor:
    """Of each update with all others: (K,)."""
    return (cosines_KK.sum(1) - cosines_KK.diag()) / (len(cosines_KK) - 1)


def _copies(uploads: Sequence[Upload], cosines_KK: Tensor) -> Iterator[Finding]:
    """The first of equal updates passes: what was sent twice shall count once."""
    equal_KK = (cosines_KK > COPY).triu(1)
    for later in equal_KK.any(0).nonzero().flatten().tolist():
        earlier = int(equal_KK[:, later].nonzero()[0])
        text = f"its update is that of client {uploads[earlier].client}; give every client its own images"
        yield Finding(uploads[later].client, "copy", cosines_KK[earlier, later].item(), text)


def _owners(uploads: Sequence[Upload], owned_K: Tensor) -> Iterator[Finding]:
    for upload, owned in zip(uploads, owned_K.tolist(), strict=True):
        if owned > OWNS:
            text = (
                f"it says that it has {upload.num_examples} images, {owned:.4g} times those of all others together: "
                "weighted by size, no other client counts; set ensemble.weights = 'uniform', or lower screen.max-images"
            )
            yield Finding(upload.client, "size", owned, text, clear=owned > CLEAR_OWNS and len(uploads) >= FEWEST)


def _of_another_draw(uploads: Sequence[Upload], kept_K: Tensor) -> Iterator[Finding]:
    """Training leaves part of the start, however long it is; weights that were drawn afresh have nothing of it."""
    for upload, kept in zip(uploads, kept_K.tolist(), strict=True):
        if kept < CLEAR_NEW:
            text = (
                f"its weights have nothing of those that all clients start from (cosine {kept:.3f}): was it trained "
                "from them, or at all?"
            )
            yield Finding(upload.client, "start", kept, text, clear=True)

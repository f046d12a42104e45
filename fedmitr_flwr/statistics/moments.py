"""Sums over one client's frozen features. They add up: the sum over clients is that of all images in one place.

A feature is the class token before the head, of the public weights that all clients start from: nothing in it was
trained on anybody's images. The sums are float64, since in float32 their own rounding (6e-8) would be the largest
difference between many clients and one.

Shapes: n images, D numbers in a feature, Y classes, U = D (D + 1) / 2 places on and above a matrix's diagonal.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import ModelConfig, UploadConfig
from ..data.images import Images, prepare

_BATCH = 256  # images
_ROUNDING = 1e-9  # of the features' whole power; honest sums of a million images differ by less
_FLOAT32 = 1e-3  # of a normalised feature's power, in which features are computed; honest ones differ by 1e-6
_SHORTEST = 0.5  # of that power: a token whose variance is below the ε of its LayerNorm (1e-6) is shorter, and none is

Norm = tuple[Tensor, Tensor]  # γ and β (D,) of the public model's last LayerNorm, whose outputs are the features


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over features z; all float64, on the CPU.

    Attributes:
        counts: (Y,) images.
        sums: (Y, D) Σ z over the images of each class.
        moment: (D, D) Σ z zᵀ over all images.
        squares: (Y, D) Σ z² over the images of each class; None: not uploaded.
    """

    counts: Tensor
    sums: Tensor
    moment: Tensor
    squares: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], counts: tuple[int, ...]) -> Self:
        """From what `measure` made, and the class counts that came with it."""
        sums_YD = tensors["sums"]
        number = torch.tensor(counts, dtype=torch.float64)
        return cls(number, sums_YD, _unpacked(tensors["moment"], sums_YD.shape[1]), tensors.get("squares"))

    def __add__(self, other: Self) -> Self:
        squares = None if self.squares is None or other.squares is None else self.squares + other.squares
        return type(self)(self.counts + other.counts, self.sums + other.sums, self.moment + other.moment, squares)

    @property
    def means(self) -> Tensor:
        """(Y, D); zeros for a class without images."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    @property
    def scatter(self) -> Tensor:
        """(D, D) Σ (z - its class's mean) (z - its class's mean)ᵀ."""
        return self.moment - self.means.T @ self.sums

    @property
    def variances(self) -> Tensor:
        """(Y, D), over the images of each class; zeros for a class without images. Needs `squares`."""
        assert self.squares is not None, "upload.extras"
        return (self.squares / self.counts.clamp_min(1)[:, None] - self.means**2).clamp_min(0)


def total(parts: Iterable[Statistics]) -> Statistics:
    """Of all images together."""
    return reduce(add, parts)


@torch.no_grad()
def frozen_features(vit: VisionTransformer, images: Images, model: ModelConfig, device: torch.device) -> Tensor:
    """What the head gets of each whole, unaugmented image: (n, D), float64 on the CPU."""
    vit.to(device).eval()
    batches = (prepare(pixels.to(device), model) for pixels in images.pixels.split(_BATCH))
    features = [vit.forward_head(vit.forward_features(batch), pre_logits=True).cpu() for batch in batches]
    return torch.cat(features).double()


def names(upload: UploadConfig) -> tuple[str, ...]:
    """What a client is asked for."""
    return ("sums", "moment", *["squares"] * upload.variances) if upload.statistics else ()


def measure(features_ND: Tensor, labels_N: Tensor, num_classes: int, *, variances: bool = False) -> dict[str, Tensor]:
    """What a client uploads beside its class counts; with `variances`, the squares, too. See `Statistics`.

    `sums` (Y, D), `moment` (U,) row by row, and perhaps `squares` (Y, D); all float64.
    """
    z_ND = features_ND.double()
    empty_YD = z_ND.new_zeros(num_classes, z_ND.shape[1])
    tensors = {"sums": empty_YD.index_add(0, labels_N, z_ND), "moment": packed(z_ND.T @ z_ND)}
    return tensors | ({"squares": empty_YD.index_add(0, labels_N, z_ND**2)} if variances else {})


def resized(tensors: Mapping[str, Tensor], counts: tuple[int, ...], wanted: tuple[int, ...]) -> dict[str, Tensor]:
    """The sums of `measure` if there were `wanted` images of each class, of the same means and scatter per image."""
    statistics, number = Statistics.of(tensors, counts), torch.tensor(wanted, dtype=torch.float64)
    shares_Y1 = (number / statistics.counts.clamp_min(1))[:, None]
    sums_YD = statistics.sums * shares_Y1
    moment_DD = statistics.scatter * (number.sum() / statistics.counts.sum()) + statistics.means.T @ sums_YD
    squares = {} if statistics.squares is None else {"squares": statistics.squares * shares_Y1}
    return {"sums": sums_YD, "moment": packed(moment_DD), **squares}


def last_norm(weights: Mapping[str, Tensor]) -> Norm | None:
    """γ and β of the last LayerNorm; None: only their shapes are known, or there is none."""
    gamma_D, beta_D = weights.get("norm.weight"), weights.get("norm.bias")
    if gamma_D is None or beta_D is None or gamma_D.is_meta:
        return None
    return gamma_D.double(), beta_D.double()


def problem(tensors: Mapping[str, Tensor], counts: tuple[int, ...], width: int, norm: Norm | None = None) -> str | None:
    """Why these cannot be sums over so many features of D = `width` numbers, made by this LayerNorm; None: they can."""
    for name, tensor in tensors.items():
        shape = (width * (width + 1) // 2,) if name == "moment" else (len(counts), width)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            return f"its statistics' {name} are {_kind(tensor.dtype, tensor.shape)}, not {_kind(torch.float64, shape)}"
        if not torch.isfinite(tensor).all():
            return f"NaN or infinity in its statistics' {name}; look at model.weights and at the images"
    statistics = Statistics.of(tensors, counts)
    contradiction = _contradiction(statistics) or (norm and _not_normalised(statistics, *norm))
    return f"its statistics are no sums of features: {contradiction}; do not edit uploads" if contradiction else None


def _contradiction(statistics: Statistics) -> str | None:
    if not torch.isfinite(statistics.scatter).all():
        return "numbers too large to be multiplied"
    rounding = _ROUNDING * (1 + statistics.moment.diagonal().abs().sum().item())
    if statistics.sums[statistics.counts == 0].any():
        return "a class without images has a sum"
    if torch.linalg.eigvalsh(statistics.scatter)[0] < -rounding:
        return "the scatter within classes has a negative eigenvalue"
    if statistics.squares is None:
        return None
    if statistics.squares[statistics.counts == 0].any():
        return "a class without images has squares"
    if (statistics.squares.sum(0) - statistics.moment.diagonal()).abs().max() > rounding:
        return "the squares do not add up to the moment's diagonal"
    if (statistics.squares - statistics.means * statistics.sums).min() < -rounding:
        return "a class has a negative variance"
    return None


def _not_normalised(statistics: Statistics, gamma_D: Tensor, beta_D: Tensor) -> str | None:
    """What contradicts that x = (z - β) / γ of each feature z has mean 0 over its D numbers, and a mean square of 1.

    The mean square is var / (var + ε), a little below 1. So over n images Σ |x|² is n D, and Σ (Σ_i x_i)² is 0; and of
    each class |mean of x|² is at most D. Where γ is all but 0, x is lost in rounding: then Σ |x|² is only bounded.
    """
    seen = gamma_D.abs() > _FLOAT32 * gamma_D.abs().max()
    gamma, beta = gamma_D[seen], beta_D[seen]
    number, total = statistics.counts.sum(), statistics.sums.sum(0)[seen]
    moment = statistics.moment[seen][:, seen]
    crossed = torch.outer(total, beta)
    moment = (moment - crossed - crossed.T + number * torch.outer(beta, beta)) / torch.outer(gamma, gamma)
    power = moment.trace().item() / (number.item() * len(gamma_D))
    if power > 1 + _FLOAT32:
        return f"a feature is {power**0.5:.3g} times as long as the LayerNorm of model.weights makes any"
    means = (statistics.means[:, seen] - beta) / gamma
    longest = means[statistics.counts > 0].square().sum(1).max().item() / len(gamma_D)
    if longest > 1 + _FLOAT32:
        return f"the mean of a class is {longest**0.5:.3g} times as long as the LayerNorm of model.weights makes any"
    if not seen.all():
        return None
    if power < _SHORTEST:
        return f"a feature has {power**0.5:.3g} of the length that the LayerNorm of model.weights gives each"
    if moment.sum().item() > _FLOAT32 * number.item() * len(gamma_D):
        return "features have not the mean that the LayerNorm of model.weights gives each"
    return None


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def packed(matrix_DD: Tensor) -> Tensor:
    """A symmetric matrix as (U,)."""
    rows, columns = torch.triu_indices(*matrix_DD.shape)
    return matrix_DD[rows, columns]


def _unpacked(packed_U: Tensor, width: int) -> Tensor:
    rows, columns = torch.triu_indices(width, width)
    matrix_DD = packed_U.new_zeros(width, width)
    matrix_DD[rows, columns] = packed_U
    matrix_DD[columns, rows] = packed_U
    return matrix_DD

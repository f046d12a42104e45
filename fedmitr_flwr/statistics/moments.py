"""Sums over one client's frozen features. They add up: the sum over clients is that of all images in one place.

A feature is what `vit.taps` makes of the public weights that all clients start from: nothing in it was trained on
anybody's images. Sums are made and added in float64, in which many clients are equal to one place; they are sent in
float32, whose rounding (6e-8) is far below what shrinkage adds to a covariance.

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
from ..vit.taps import FEATURES, count_taps, projection, taps

_BATCH = 128  # images
_ROUNDING = 1e-6  # of the features' whole power; honest sums differ by less than 2e-7, the rounding to float32
# Of the mean square of a feature's numbers. Class tokens are a sixth of the taps or more, and have 1; means of patches
# have less; a projection to 512 random signs changes the whole by some 6 percent.
_POWER = 0.1, 1.5


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
        """From what `measure` made, as it was or as it was sent, and the class counts that came with it."""
        told = {name: tensor.double() for name, tensor in tensors.items()}
        number = torch.tensor(counts, dtype=torch.float64)
        return cls(number, told["sums"], _unpacked(told["moment"], told["sums"].shape[1]), told.get("squares"))

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
    """Of each whole, unaugmented image: (n, D), float64 on the CPU."""
    vit.to(device).eval()
    projected_TD = projection(count_taps(vit.state_dict()))
    batches = (prepare(pixels.to(device), model) for pixels in images.pixels.split(_BATCH))
    return torch.cat([taps(vit, batch).cpu().double() @ projected_TD for batch in batches])


def sent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `measure` made, as it is uploaded."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def names(upload: UploadConfig) -> tuple[str, ...]:
    """What a client is asked for."""
    return ("sums", "moment", *["squares"] * upload.variances) if upload.statistics else ()


def like(weights: Mapping[str, Tensor], upload: UploadConfig) -> dict[str, Tensor]:
    """What a client sends that starts from weights like these, without its numbers; only their shapes are looked at."""
    classes, width = len(weights["head.weight"]), min(FEATURES, count_taps(weights))
    shapes = {name: (width * (width + 1) // 2,) if name == "moment" else (classes, width) for name in names(upload)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


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


def problem(tensors: Mapping[str, Tensor], counts: tuple[int, ...], wanted: Mapping[str, Tensor]) -> str | None:
    """Why these cannot be sums over features, as they are sent and as `like` wants them; None: they can."""
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            line = f"its statistics' {name} are {_kind(tensor)}, not {_kind(wanted[name])}"
            of_0_1_0 = "; 0.1.0 summed other features: fuse without them, upload.extras = 'counts'"
            return line + of_0_1_0 * (tensor.dtype == torch.float64)
        if not torch.isfinite(tensor).all():
            return f"NaN or infinity in its statistics' {name}; look at model.weights and at the images"
    statistics = Statistics.of(tensors, counts)
    contradiction = _contradiction(statistics) or _impossible_length(statistics)
    return f"its statistics are no sums of features: {contradiction}; do not edit uploads" if contradiction else None


def _contradiction(statistics: Statistics) -> str | None:
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


def _impossible_length(statistics: Statistics) -> str | None:
    """What contradicts that features are of tokens that were normalised: see `_POWER`."""
    least, most = _POWER
    power = statistics.moment.trace().item() / (statistics.counts.sum().item() * len(statistics.moment))
    longest = statistics.means.square().mean(1).max().item()
    for length, what in ((power, "a feature"), (max(longest, least), "the mean of a class")):
        if not least <= length <= most:
            return f"{what} is {length**0.5:.3g} long where taps of model.weights are 0.4 to 1"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


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

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
        assert self.squares is not None, "upload.variances"
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
    """What a client uploads beside its class counts.

    Args:
        features_ND: any floating type.
        labels_N: int64 classes.
        num_classes: Y.
        variances: give the squares, too.

    Returns:
        `sums` (Y, D), `moment` (U,) row by row, and perhaps `squares` (Y, D); all float64. See `Statistics`.
    """
    z_ND = features_ND.double()
    empty_YD = z_ND.new_zeros(num_classes, z_ND.shape[1])
    tensors = {"sums": empty_YD.index_add(0, labels_N, z_ND), "moment": _packed(z_ND.T @ z_ND)}
    return tensors | ({"squares": empty_YD.index_add(0, labels_N, z_ND**2)} if variances else {})


def problem(tensors: Mapping[str, Tensor], counts: tuple[int, ...], width: int) -> str | None:
    """Why these cannot be sums over so many features of D = `width` numbers; None: they can."""
    for name, tensor in tensors.items():
        shape = (width * (width + 1) // 2,) if name == "moment" else (len(counts), width)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            return f"its statistics' {name} are {_kind(tensor.dtype, tensor.shape)}, not {_kind(torch.float64, shape)}"
        if not torch.isfinite(tensor).all():
            return f"NaN or infinity in its statistics' {name}; look at model.weights and at the images"
    contradiction = _contradiction(Statistics.of(tensors, counts))
    return contradiction and f"its statistics are no sums of features: {contradiction}; do not edit uploads"


def _contradiction(told: Statistics) -> str | None:
    rounding = _ROUNDING * (1 + told.moment.diagonal().abs().sum().item())
    if told.sums[told.counts == 0].any():
        return "a class without images has a sum"
    if torch.linalg.eigvalsh(told.scatter)[0] < -rounding:
        return "the scatter within classes has a negative eigenvalue"
    if told.squares is None:
        return None
    if (told.squares.sum(0) - told.moment.diagonal()).abs().max() > rounding:
        return "the squares do not add up to the moment's diagonal"
    if (told.squares - told.means * told.sums).min() < -rounding:
        return "a class has a negative variance"
    return None


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _packed(matrix_DD: Tensor) -> Tensor:
    """A symmetric matrix as (U,)."""
    rows, columns = torch.triu_indices(*matrix_DD.shape)
    return matrix_DD[rows, columns]


def _unpacked(packed_U: Tensor, width: int) -> Tensor:
    rows, columns = torch.triu_indices(width, width)
    matrix_DD = packed_U.new_zeros(width, width)
    matrix_DD[rows, columns] = packed_U
    matrix_DD[columns, rows] = packed_U
    return matrix_DD

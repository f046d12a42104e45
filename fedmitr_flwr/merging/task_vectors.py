"""One model from the clients' updates (task vectors) τ_k = w_k - w⁰, without data and without a step of training.

`wudi` and `tsv` merge the matrices of the transformer's blocks; what is no such matrix (embeddings, biases, norms,
head) is averaged by numbers of images.

Shapes: K clients, O outputs and I inputs of a layer, R = min(O, I).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..uploads.updates import stacked
from ..uploads.upload import Upload
from ..vit.build import Weights
from .average import average
from .layerwise import least_squares

HOLD = 0.1  # WUDI's ridge towards the mean update; first trials on two pretrained cells: 0.03 to 0.3 are alike [M]


def wudi(uploads: Sequence[Upload], start: Mapping[str, Tensor]) -> Weights:
    """WUDI (Cheng et al. 2025) in closed form: the update T of a layer that interferes least with the clients'.

    T has the least Σ_k ‖(T - τ_k) τ_kᵀ‖² / ‖τ_k‖² + ρ ‖T - τ̄‖²: it acts as τ_k does on what spans the rows of τ_k,
    which are sums of the layer's inputs. The paper descends from Σ_k τ_k; here the minimum is solved for, held by ρ to
    the mean update τ̄ [M]. It is RegMean's form, with G_k = τ_kᵀ τ_k / ‖τ_k‖² in place of the inputs' second moments.
    """

    def least_interfering(updates_KOI: Tensor, mean_OI: Tensor) -> Tensor:
        gram_KII = updates_KOI.mT @ updates_KOI
        gram_KII /= gram_KII.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]
        return least_squares(gram_KII.sum(0), (updates_KOI @ gram_KII).sum(0), mean_OI, HOLD)

    return _by_matrix(uploads, start, least_interfering)


def tsv(uploads: Sequence[Upload], start: Mapping[str, Tensor]) -> Weights:
    """TSV-M (Gargiulo et al. 2025): each client's leading R / K singular vectors, made orthogonal to all others'."""

    def orthogonalised(updates_KOI: Tensor, _: Tensor) -> Tensor:
        u_KOR, s_KR, vt_KRI = torch.linalg.svd(updates_KOI, full_matrices=False)
        rank = max(1, s_KR.shape[1] // len(updates_KOI))
        left = _nearest_orthogonal(torch.cat(list(u_KOR[:, :, :rank]), dim=1))
        right = _nearest_orthogonal(torch.cat(list(vt_KRI[:, :rank])))
        merged_OI: Tensor = (left * s_KR[:, :rank].flatten()) @ right
        return merged_OI

    return _by_matrix(uploads, start, orthogonalised)


def merged(uploads: Sequence[Upload], start: Mapping[str, Tensor], merge: Callable[[Tensor], Tensor]) -> Weights:
    """w⁰ + `merge(updates (K, ...))` in float64, one tensor of all uploads at a time."""
    found = {}
    for name, weights in stacked(uploads):
        origin = start[name].double()
        found[name] = (origin + merge(weights.double() - origin)).to(weights.dtype)
    return found


def _by_matrix(
    uploads: Sequence[Upload], start: Mapping[str, Tensor], merge: Callable[[Tensor, Tensor], Tensor]
) -> Weights:
    """The average, but for the blocks' matrices: w⁰ + `merge(updates (K, O, I), their mean (O, I))`, in float64."""
    found = average(uploads)
    for name, weights in stacked(uploads):
        if name.startswith("blocks.") and weights.dim() == 3:
            origin = start[name].double()
            update = merge(weights.double() - origin, found[name].double() - origin)
            found[name] = (origin + update).to(weights.dtype)
    return found


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix of the same shape with orthonormal rows or columns that is nearest (Procrustes): U Vᵀ of its SVD."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest

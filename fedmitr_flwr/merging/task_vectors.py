"""One model from the clients' updates (task vectors) τ_k = w_k - w⁰, without data and without a step of training.

`wudi` and `tsv` merge the matrices of the transformer's blocks; what is no such matrix (embeddings, biases, norms,
head) is averaged by numbers of images.

Shapes: K clients, O outputs and I inputs of a layer, R = min(O, I).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

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

    def least_interfering(updates: Iterable[Tensor], mean_OI: Tensor) -> Tensor:
        outputs, inputs = mean_OI.shape
        gram_II, cross_OI = mean_OI.new_zeros(inputs, inputs), mean_OI.new_zeros(outputs, inputs)
        for update_OI in updates:
            own_II = update_OI.T @ update_OI
            own_II /= own_II.trace().clamp_min(1e-30)
            gram_II += own_II
            cross_OI += update_OI @ own_II
        return least_squares(gram_II, cross_OI, mean_OI, HOLD)

    return _by_matrix(uploads, start, least_interfering)


def tsv(uploads: Sequence[Upload], start: Mapping[str, Tensor]) -> Weights:
    """TSV-M (Gargiulo et al. 2025): each client's leading R / K singular vectors, made orthogonal to all others'."""

    def orthogonalised(updates: Iterable[Tensor], mean_OI: Tensor) -> Tensor:
        rank = max(1, min(mean_OI.shape) // len(uploads))
        factors = [torch.linalg.svd(update_OI, full_matrices=False) for update_OI in updates]
        left = _nearest_orthogonal(torch.cat([u_OR[:, :rank] for u_OR, _, _ in factors], dim=1))
        right = _nearest_orthogonal(torch.cat([vt_RI[:rank] for _, _, vt_RI in factors]))
        merged_OI: Tensor = (left * torch.cat([s_R[:rank] for _, s_R, _ in factors])) @ right
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
    uploads: Sequence[Upload], start: Mapping[str, Tensor], merge: Callable[[Iterable[Tensor], Tensor], Tensor]
) -> Weights:
    """The average, but for the blocks' matrices: w⁰ + `merge(updates (O, I), their mean)`, in float64.

    One update is read at a time: of many clients, or of wide layers, all of them take gigabytes.
    """
    found = average(uploads)
    for name, mean in found.items():
        if name.startswith("blocks.") and mean.dim() == 2:
            origin = start[name].double()
            updates = (upload.weights[name].double() - origin for upload in uploads)
            found[name] = (origin + merge(updates, mean.double() - origin)).to(mean.dtype)
    return found


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix of the same shape with orthonormal rows or columns that is nearest (Procrustes): U Vᵀ of its SVD."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest

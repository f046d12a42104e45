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
from .layerwise import least_squares

Merge = Callable[[Tensor], Tensor]  # (K, ...) -> (...)

HOLD = 0.1  # WUDI's ridge towards the mean update; first trials on two pretrained cells: 0.03 to 0.3 are alike [M]


def wudi(uploads: Sequence[Upload], start: Mapping[str, Tensor]) -> Weights:
    """WUDI (Cheng et al. 2025) in closed form: the update T of a layer that interferes least with the clients'.

    T has the least Σ_k ‖(T - τ_k) τ_kᵀ‖² / ‖τ_k‖² + ρ ‖T - τ̄‖²: it acts as τ_k does on what spans the rows of τ_k,
    which are sums of the layer's inputs. The paper descends from Σ_k τ_k; here the minimum is solved for, held by ρ to
    the mean update τ̄ [M]. It is RegMean's form, with G_k = τ_kᵀ τ_k / ‖τ_k‖² in place of the inputs' second moments.
    """
    mean = weighted_mean(uploads)

    def least_interfering(updates_KOI: Tensor) -> Tensor:
        gram_KII = updates_KOI.mT @ updates_KOI
        gram_KII /= gram_KII.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]
        return least_squares(gram_KII.sum(0), (updates_KOI @ gram_KII).sum(0), mean(updates_KOI), HOLD)

    return merged(uploads, start, mean, least_interfering)


def tsv(uploads: Sequence[Upload], start: Mapping[str, Tensor]) -> Weights:
    """TSV-M (Gargiulo et al. 2025): each client's leading R / K singular vectors, made orthogonal to all others'."""

    def orthogonalised(updates_KOI: Tensor) -> Tensor:
        u_KOR, s_KR, vt_KRI = torch.linalg.svd(updates_KOI, full_matrices=False)
        rank = max(1, s_KR.shape[1] // len(updates_KOI))
        left = _nearest_orthogonal(torch.cat(list(u_KOR[:, :, :rank]), dim=1))
        right = _nearest_orthogonal(torch.cat(list(vt_KRI[:, :rank])))
        merged_OI: Tensor = (left * s_KR[:, :rank].flatten()) @ right
        return merged_OI

    return merged(uploads, start, weighted_mean(uploads), orthogonalised)


def merged(
    uploads: Sequence[Upload], start: Mapping[str, Tensor], merge: Merge, merge_matrices: Merge | None = None
) -> Weights:
    """w⁰ + `merge(updates)` in float64, one tensor of all uploads at a time.

    `merge_matrices`, if given, is for the matrices of the transformer's blocks.
    """
    found = {}
    for name, weights in stacked(uploads):
        updates = weights.double() - start[name].double()
        of_block = name.startswith("blocks.") and updates.dim() == 3
        how = merge_matrices if merge_matrices is not None and of_block else merge
        found[name] = (start[name].double() + how(updates)).to(weights.dtype)
    return found


def weighted_mean(uploads: Sequence[Upload]) -> Merge:
    """The mean of updates by the clients' numbers of images."""
    sizes_K = torch.tensor([upload.num_examples for upload in uploads], dtype=torch.float64)
    shares_K = sizes_K / sizes_K.sum()
    return lambda updates: torch.einsum("k,k...->...", shares_K, updates)


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The matrix of the same shape with orthonormal rows or columns that is nearest (Procrustes): U Vᵀ of its SVD."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest

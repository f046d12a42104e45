"""What teachers say together if each is believed in the differences between the classes that it knows.

A teacher's logits z_k mean something up to a constant c_k that depends on the image, and between classes it has seen:

    z_ky(x) = s_y(x) + c_k(x) + noise of variance 1 / w_ky,    w_ky = a_ky / Σ_y a_ky

with a the ensemble's weights. The scores s are a least-squares ranking on the graph that joins two classes if a teacher
knows both (HodgeRank, Jiang et al. 2011) [C], held to the weighted mean of the centred logits; that teachers are ranked
so, w and λ are ours [M]:

    s = (Σ_k P_k + λ I)⁻¹ Σ_k (P_k z_k + λ a_k (z_k - z̄_k)),    P_k = diag(w_k) - w_k w_kᵀ

λ is the mean of the diagonal of Σ_k P_k. Of classes that no teacher compares, the weighted mean alone says which it is.
The map is linear and the same for all images, so it merges heads as it merges what they say.

Shapes: K teachers, Y classes.
"""

import torch
from torch import Tensor


class Contrast:
    """The map of teachers with these weights. A factor of all of a class's weights changes nothing."""

    def __init__(self, weights_KY: Tensor) -> None:
        """Columns of `weights_KY` need not sum to 1."""
        weights = weights_KY.cpu().double()  # not every device has float64
        mean_KY = weights / weights.sum(0).clamp_min(1e-30)
        known_KY = mean_KY / mean_KY.sum(1, keepdim=True).clamp_min(1e-30)
        joined_YY = torch.diag(known_KY.sum(0)) - known_KY.T @ known_KY
        hold = joined_YY.diagonal().mean().clamp_min(1e-6)  # rounding alone if each teacher knows one class
        none_YY = torch.eye(len(joined_YY), dtype=torch.float64)
        self._known_KY = known_KY.to(weights_KY)
        self._held_KY = (hold * mean_KY).to(weights_KY)
        self._solved_YY = torch.linalg.inv(joined_YY + hold * none_YY).to(weights_KY)

    def part(self, k: int, logits: Tensor) -> Tensor:
        """What teacher k adds (..., Y) by its logits (..., Y)."""
        known_Y = self._known_KY[k]
        compared = known_Y * (logits - (known_Y * logits).sum(-1, keepdim=True))
        return compared + self._held_KY[k] * (logits - logits.mean(-1, keepdim=True))

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """What two add together."""
        return one + other

    def scores(self, parts: Tensor) -> Tensor:
        """The scores (..., Y) by what all teachers add."""
        scores: Tensor = parts @ self._solved_YY
        return scores

"""Covariance of the head's gradient under hard and soft labels of patch tokens, in closed form.

The gradient of a token's cross-entropy by the head's weights and bias is e zᵀ, with e = softmax(g) - label and z the
token's features and a 1 for the bias. A hard label y that is drawn from q, given the token, adds to the trace of its
covariance what a soft label q does not have: E[(1 - |q|²) |z|²], by the law of total variance.

Shapes: M images, J tokens of each, Y classes, D features and a 1.
"""

from copy import deepcopy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..distillation.distil import seen
from ..ensemble.ensemble import Ensemble
from ..inversion.pool import Pool
from ..vit.tokens import forward_tokens, take
from .gap import Shown


def trace(errors_MJY: Tensor, features_MJD: Tensor) -> dict[str, float]:
    """Trace of the covariance of e zᵀ, each token a sample (`token`), and of its mean over an image (`image`)."""
    power = (errors_MJY.square().sum(-1) * features_MJD.square().sum(-1)).mean()
    by_image_MYD = errors_MJY.transpose(1, 2) @ features_MJD / features_MJD.shape[1]
    mean = by_image_MYD.mean(0).square().sum()
    return {
        "token": (power - mean).item(),
        "image": (by_image_MYD.square().sum((1, 2)).mean() - mean).item(),
    }


def within(labels_MJY: Tensor, features_MJD: Tensor) -> float:
    """What hard labels would add to the trace by token, were they drawn from these soft ones; of hard ones 0."""
    return ((1 - labels_MJY.square().sum(-1)) * features_MJD.square().sum(-1)).mean().item()


def squared_mean(samples_MF: Tensor) -> float:
    """|E[s]|² of independent samples, without the part that their finite number adds; it may be below 0."""
    count = len(samples_MF)
    return (samples_MF.mean(0).square().sum() - samples_MF.var(0).sum() / count).item()


@torch.no_grad()
def tokens(student: VisionTransformer, patches_MJE: Tensor, positions_MJ: Tensor) -> tuple[Tensor, Tensor]:
    """The student's distribution (M, J, Y) on each patch token, and what its head is given there (M, J, D); float64."""
    body = deepcopy(student)
    body.head = nn.Identity()
    features = forward_tokens(body, patches_MJE, positions_MJ).patches
    ones = torch.ones_like(features[..., :1])
    return student.head(features).double().softmax(-1), torch.cat([features, ones], -1).double()


def soft_labels(ensemble: Ensemble, patches_MJE: Tensor, positions_MJ: Tensor) -> Tensor:
    """The ensemble's distribution on each patch token (M, J, Y); float64."""
    return ensemble.scores(patches_MJE, positions_MJ).patches.double().softmax(-1)


def head_variance(student: VisionTransformer, ensemble: Ensemble, pool: Pool) -> dict[str, float]:
    """`trace` on a pool with its labels: the class on dense tokens, the ensemble's soft labels on the others.

    `within` is what the law of total variance says that the soft labels save by token, were they the classes'
    distribution given the token; on the pool the classes are fixed, so it need not be what is saved.
    """
    every = torch.arange(len(pool), device=pool.patches.device)
    patches, positions = seen(pool, every), pool.positions
    said, features = tokens(student, patches, positions)
    hard = F.one_hot(pool.targets, said.shape[-1]).double()[:, None]
    labels = torch.where(pool.dense[..., None], hard, soft_labels(ensemble, patches, positions))
    return {**trace(said - labels, features), "within": within(labels, features)}


def bias(student: VisionTransformer, ensemble: Ensemble, real: Shown, kept: int) -> dict[str, float]:
    """What relabelling costs on real images: all but each one's `kept` most important tokens, as `dense` has them.

    `bias` is |E[(y - q) zᵀ]|², 0 where q is the classes' distribution given the token; `saved` is the difference of the
    traces by token with the true classes and with q.
    """
    importance = ensemble.importance(real.patches, real.positions, real.labels)
    low = importance.argsort(1, descending=True)[:, kept:]
    said, features = tokens(student, real.patches, real.positions)
    soft = soft_labels(ensemble, real.patches, real.positions)
    said, features, soft = (take(each, low) for each in (said, features, soft))
    hard = F.one_hot(real.labels, said.shape[-1]).double()[:, None]
    off_MYD = (hard - soft).transpose(1, 2) @ features / features.shape[1]
    saved = trace(said - hard, features)["token"] - trace(said - soft, features)["token"]
    return {"bias": squared_mean(off_MYD.flatten(1)), "saved": saved, "within": within(soft, features)}

"""The distillation loss in named parts: high, low and kd.

Shapes: B rows of two mixed images each, J tokens, Y classes. Each token is of one of the two images; the class token is
of both, in the share of their tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.sections import CONTRAST
from ..vit.tokens import TokenLogits

HIGH = 0.1  # weight of the pseudo-labels in the whole loss
TOKEN = 0.5  # weight of the dense patch tokens among them
# Where the ensemble teaches probabilities: τ of the class token, and of relabelled tokens.
TEMPERATURE = 2.0
LOW_TEMPERATURE = 1.0


class Labels(NamedTuple):
    """What one of two mixed images asks of the student. Weights are 0 or 1 but for `share`."""

    targets: Tensor  # (B,) the pseudo-labels
    hard: Tensor  # (B,) True = the image has dense patches, so the class token learns its pseudo-label
    share: Tensor  # (B,) of the tokens that are the image's; the rest is the other's
    own: Tensor  # (B, J) 1 = the token is the image's
    dense: Tensor  # (B, J) 1 = the image's patch there is dense: its token keeps the pseudo-label; 0 = it is relabelled


class Parts(NamedTuple):
    high: Tensor
    low: Tensor
    kd: Tensor

    def total(self) -> Tensor:
        """L = 0.1 L_high + L_low + L_kd."""
        return HIGH * self.high + self.low + self.kd


def distillation_loss(student: TokenLogits, ensemble: TokenLogits, labels: Sequence[Labels], teach: str) -> Parts:
    """Of the student's answers on one batch, against the ensemble's and the labels of each of the mixed images.

    L_high = CE(g_cls, y) + 0.5 · mean over dense tokens of CE(g_i, y)
    L_low  = mean over the other tokens of |A_i - g_i|² / Y, of centred logits
    L_kd   = |A - g_cls|² / Y, likewise

    Where the ensemble teaches (`teach`) probabilities and no logits, τ² KL(softmax(A / τ) ‖ softmax(g / τ)) stands in
    place of either distance: logarithms of small probabilities, unlike logits, are all tail.

    Decoupled into a sparsity mask and a relabelling term as in the paper [S]; the forms are ours [M].
    """
    tokens_BYJ = student.patches.transpose(1, 2)

    def soft(teacher_Y: Tensor, student_Y: Tensor, temperature: float) -> Tensor:
        if teach in ("logits", CONTRAST):
            return logit_distance(teacher_Y, student_Y)
        return soft_divergence(teacher_Y, student_Y, temperature)

    def class_entropy(targets_B: Tensor) -> Tensor:
        return F.cross_entropy(student.cls, targets_B, reduction="none")

    def token_entropy(targets_B: Tensor) -> Tensor:
        targets_BJ = targets_B[:, None].expand(-1, tokens_BYJ.shape[2])
        return F.cross_entropy(tokens_BYJ, targets_BJ, reduction="none")

    hard = _mean([(image.share * image.hard, class_entropy(image.targets)) for image in labels])
    dense = _mean([(image.own * image.dense, token_entropy(image.targets)) for image in labels])
    relabelled_BJ = soft(ensemble.patches, student.patches, LOW_TEMPERATURE)
    low = _mean([(image.own * (1 - image.dense), relabelled_BJ) for image in labels])
    kd = _mean([(image.share, soft(ensemble.cls, student.cls, TEMPERATURE)) for image in labels])
    return Parts(hard + TOKEN * dense, low, kd)


def plain_loss(student: TokenLogits, ensemble: TokenLogits, temperature: float) -> Parts:
    """Of whole images, T² KL(softmax(A / T) ‖ softmax(g_cls / T)) alone: the distillation of the rivals."""
    nothing = torch.zeros((), device=student.cls.device)
    return Parts(nothing, nothing, soft_divergence(ensemble.cls, student.cls, temperature).mean())


def soft_divergence(teacher_Y: Tensor, student_Y: Tensor, temperature: float) -> Tensor:
    """τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)) over the last axis (Hinton et al. 2015)."""
    wanted = (teacher_Y / temperature).log_softmax(-1)
    given = (student_Y / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)


def logit_distance(teacher_Y: Tensor, student_Y: Tensor) -> Tensor:
    """Mean squared difference of centred logits over the last axis (Ba and Caruana 2014).

    Logits that differ by a constant are the same answer, hence centred. It is twice `soft_divergence` at τ → ∞.
    """
    return centred(teacher_Y - student_Y).square().mean(-1)


def centred(answers_Y: Tensor) -> Tensor:
    """Logits (..., Y) less their mean over the classes, which says nothing of any."""
    return answers_Y - answers_Y.mean(-1, keepdim=True)


def _mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ weight · loss / Σ weight over all parts; 0 where nothing has weight."""
    total = torch.stack([(weight * loss).sum() for weight, loss in parts]).sum()
    return total / torch.stack([weight.sum() for weight, _ in parts]).sum().clamp_min(1e-12)

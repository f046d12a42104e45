"""The distillation loss in named parts: high, low and kd.

Shapes: B images, J given patches, Y classes. Weights say how much a label counts for a token; where two images are
mixed, each token has the labels of both, with weights that sum to 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vit.tokens import TokenLogits

HIGH = 0.1  # weight of the pseudo-labels in the whole loss
TOKEN = 0.5  # weight of the high-density patch tokens among them
# Where the ensemble teaches probabilities: T of the class token, τ of low-density tokens.
TEMPERATURE = 2.0
LOW_TEMPERATURE = 1.0


class Labels(NamedTuple):
    """What one of the mixed images asks of the student."""

    targets: Tensor  # (B,) the pseudo-labels
    hard: Tensor  # (B,) weight of the pseudo-label for the class token
    high: Tensor  # (B, J) weight of the pseudo-label for each patch token
    low: Tensor  # (B, J) weight of the soft label for each patch token
    share: Tensor  # (B,) weight of the ensemble's answer for the class token
    scores: Tensor  # (B, Y) that answer
    token_scores: Tensor  # (B, J, Y) its answers for the patch tokens


class Parts(NamedTuple):
    high: Tensor
    low: Tensor
    kd: Tensor

    def total(self) -> Tensor:
        """L = 0.1 L_high + L_low + L_kd."""
        return HIGH * self.high + self.low + self.kd


def distillation_loss(student: TokenLogits, labels: list[Labels], teach: str) -> Parts:
    """Of the student's answers on one batch, against the labels of each of the mixed images.

    L_high = CE(g_cls, y) + 0.5 · mean over high-density tokens of CE(g_i, y)
    L_low  = mean over low-density tokens of |A_i - g_i|² / Y, of centred logits
    L_kd   = |A - g_cls|² / Y, likewise

    Where the ensemble teaches (`teach`) probabilities and no logits, τ² KL(softmax(A / τ) ‖ softmax(g / τ)) stands in
    place of either distance: logarithms of small probabilities, unlike logits, are all tail.

    Decoupled into a sparsity mask and a relabelling term as in the paper [S]; the forms are ours [M].
    """
    tokens_BYJ = student.patches.transpose(1, 2)
    hard = _mean([(each.hard, F.cross_entropy(student.cls, each.targets, reduction="none")) for each in labels])
    high = _mean(
        [
            (each.high, F.cross_entropy(tokens_BYJ, _spread(each.targets, each.high), reduction="none"))
            for each in labels
        ]
    )

    def soft(teacher_Y: Tensor, student_Y: Tensor, temperature: float) -> Tensor:
        if teach == "logits":
            return logit_distance(teacher_Y, student_Y)
        return soft_divergence(teacher_Y, student_Y, temperature)

    low = _mean([(each.low, soft(each.token_scores, student.patches, LOW_TEMPERATURE)) for each in labels])
    kd = _mean([(each.share, soft(each.scores, student.cls, TEMPERATURE)) for each in labels])
    return Parts(hard + TOKEN * high, low, kd)


def plain_loss(student: TokenLogits, scores_BY: Tensor, temperature: float) -> Parts:
    """Of whole images, T² KL(softmax(A / T) ‖ softmax(g_cls / T)) alone: the distillation of the rivals."""
    nothing = torch.zeros((), device=scores_BY.device)
    return Parts(nothing, nothing, soft_divergence(scores_BY, student.cls, temperature).mean())


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


def _spread(targets_B: Tensor, like_BJ: Tensor) -> Tensor:
    return targets_B[:, None].expand(-1, like_BJ.shape[1])


def _mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ weight · loss / Σ weight over all parts; 0 where nothing has weight."""
    total = torch.stack([(weight * loss).sum() for weight, loss in parts]).sum()
    return total / torch.stack([weight.sum() for weight, _ in parts]).sum().clamp_min(1e-12)

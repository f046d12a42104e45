"""Length of each image's gradient by the student's weights: an empirical Lipschitz constant of the loss.

Shapes: M images, J patches of each that are seen, Y classes.
"""

from collections.abc import Callable, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..distillation.distil import seen
from ..distillation.losses import Labels, Parts, distillation_loss
from ..ensemble.ensemble import Ensemble
from ..inversion.pool import Pool
from ..vit.tokens import TokenLogits, forward_tokens

Figures = dict[str, float]


def gradient_norms(loss_of: Callable[[int], Tensor], parameters: Sequence[Tensor], count: int) -> Figures:
    """Of the gradients of `loss_of(0)` ... `loss_of(count - 1)`: their lengths, and the trace of their covariance."""
    squares, total = [], torch.zeros((), dtype=torch.float64)
    for number in range(count):
        found = torch.autograd.grad(loss_of(number), parameters, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in found]).double()
        squares.append(gradient.square().sum())
        total = total + gradient if total.dim() else gradient
    power = torch.stack(squares)
    norms = power.sqrt()
    return {
        "max": norms.max().item(),
        "p95": norms.quantile(0.95).item(),
        "mean": norms.mean().item(),
        "trace": (power.mean() - (total / count).square().sum()).item(),
    }


def student_norms(student: VisionTransformer, ensemble: Ensemble, pool: Pool, images: int) -> dict[str, Figures]:
    """`gradient_norms` by all weights, of the loss on each of the first `images`, not mixed or thinned: `whole`.

    And of its pseudo-labels alone, before their weight in the whole: `pseudo-labels`.
    """
    rows = torch.arange(min(images, len(pool)), device=pool.patches.device)
    patches, positions = seen(pool, rows), pool.positions[rows]
    soft, every = ensemble.scores(patches, positions), torch.ones_like(pool.dense[rows], dtype=torch.float32)
    hard, dense = pool.dense[rows].any(1), pool.dense[rows].float()
    parameters = list(student.parameters())

    def parts(number: int) -> Parts:
        one = slice(number, number + 1)
        labels = Labels(pool.targets[rows][one], hard[one], torch.ones_like(every[one, 0]), every[one], dense[one])
        answers = forward_tokens(student, patches[one], positions[one])
        return distillation_loss(answers, TokenLogits(soft.cls[one], soft.patches[one]), [labels], ensemble.teach)

    return {
        "whole": gradient_norms(lambda number: parts(number).total(), parameters, len(rows)),
        "pseudo-labels": gradient_norms(lambda number: parts(number).high, parameters, len(rows)),
    }

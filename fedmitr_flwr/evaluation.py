"""How good is a model on real images?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.images import Images, prepare


@dataclass(frozen=True)
class Evaluation:
    """How a model did on some images.

    Attributes:
        accuracy: in percent.
        loss: mean cross-entropy.
        per_class: recall in percent; NaN where there is no image of a class.
        num_examples: how many images.
        confusion: images by true class (row) and answer (column); empty: not told.
    """

    accuracy: float
    loss: float
    per_class: tuple[float, ...]
    num_examples: int
    confusion: tuple[tuple[int, ...], ...] = ()


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    images: Images,
    img_size: int,
    num_classes: int,
    batch_size: int,
    device: torch.device,
) -> Evaluation:
    """`predict` maps normalised images (B, C, S, S) to scores (B, Y), of which softmax gives probabilities."""
    cells = torch.zeros(num_classes**2, dtype=torch.int64)
    loss = 0.0
    for rows in torch.arange(len(images)).split(batch_size):
        labels = images.labels[rows]
        scores = predict(prepare(images.pixels[rows], img_size).to(device)).float().cpu()
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        cells += torch.bincount(labels * num_classes + scores.argmax(-1), minlength=num_classes**2)
    confusion_YY = cells.view(num_classes, num_classes)
    right, count = confusion_YY.diag().double(), len(images)
    recall = tuple((100 * right / confusion_YY.sum(1)).tolist())
    answers = tuple(map(tuple, confusion_YY.tolist()))
    return Evaluation(100 * right.sum().item() / count, loss / count, recall, count, answers)

"""How good is a model on real images?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.images import Images, prepare


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and per-class recall in percent (NaN where there is no image of a class), loss, number of images."""

    accuracy: float
    loss: float
    per_class: tuple[float, ...]
    num_examples: int


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
    right = torch.zeros(num_classes, dtype=torch.float64)
    loss = 0.0
    for rows in torch.arange(len(images)).split(batch_size):
        labels = images.labels[rows]
        scores = predict(prepare(images.pixels[rows], img_size).to(device)).float().cpu()
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        right += torch.bincount(labels[scores.argmax(-1) == labels], minlength=num_classes)
    seen = torch.bincount(images.labels, minlength=num_classes)
    count = len(images)
    recall = tuple((100 * right / seen).tolist())
    return Evaluation(100 * right.sum().item() / count, loss / count, recall, count)

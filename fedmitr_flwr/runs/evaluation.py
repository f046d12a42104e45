"""How good is a model on real images?

Shapes: B or M images, Y classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import ModelConfig
from ..data.images import Images, prepare

BATCH = 256  # images that a model is asked about at once
BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class Evaluation:
    """How a model did on some images."""

    accuracy: float  # in percent
    loss: float  # mean cross-entropy
    per_class: tuple[float, ...]  # recall in percent; NaN where there is no image of a class
    num_examples: int  # how many images
    confusion: tuple[tuple[int, ...], ...] = ()  # images by true class (row) and answer (column); empty: not known
    ece: float | None = None  # expected calibration error, in percent; None: not known

    @property
    def calibration(self) -> dict[str, float | None]:
        """For result.json."""
        return {"nll": round(self.loss, 4), "ece": None if self.ece is None else round(self.ece, 2)}


def evaluate(
    predict: Callable[[Tensor], Tensor], images: Images, model: ModelConfig, device: torch.device
) -> Evaluation:
    """`predict` maps normalised images (B, C, S, S) to scores (B, Y), of which softmax gives probabilities."""
    return graded(scores_of(predict, images, model, device), images.labels, model.num_classes)


@torch.no_grad()
def scores_of(predict: Callable[[Tensor], Tensor], images: Images, model: ModelConfig, device: torch.device) -> Tensor:
    """What `predict` says of all images (M, Y), on the CPU."""
    batches = images.pixels.split(BATCH)
    return torch.cat([predict(prepare(pixels.to(device), model)).float().cpu() for pixels in batches])


def graded(scores_MY: Tensor, labels_M: Tensor, num_classes: int) -> Evaluation:
    """How good these answers are."""
    loss = F.cross_entropy(scores_MY, labels_M).item()
    cells = torch.bincount(labels_M * num_classes + scores_MY.argmax(-1), minlength=num_classes**2)
    confusion_YY = cells.view(num_classes, num_classes)
    right, count = confusion_YY.diag().double(), len(labels_M)
    recall = tuple((100 * right / confusion_YY.sum(1)).tolist())
    answers = tuple(map(tuple, confusion_YY.tolist()))
    ece = calibration_error(scores_MY, labels_M) if math.isfinite(loss) else None
    return Evaluation(100 * right.sum().item() / count, loss, recall, count, answers, ece)


def calibration_error(scores_MY: Tensor, labels_M: Tensor) -> float:
    """In percent: how far confidence is from accuracy, mean over `BINS` bins of equal width (Guo et al. 2017)."""
    sure_M, answers_M = scores_MY.double().softmax(-1).max(-1)
    excess_M = sure_M - (answers_M == labels_M).double()
    bins_M = (BINS * sure_M).long().clamp(max=BINS - 1)
    return 100 * excess_M.new_zeros(BINS).index_add_(0, bins_M, excess_M).abs().sum().item() / len(labels_M)

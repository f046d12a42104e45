"""Accuracy, loss and recall by hand, whatever the batch size; where there is no image of a class there is no recall."""

import math

import pytest
import torch
from tiny import small
from torch import Tensor

from fedmitr_flwr.data.images import DataSet, Images, prepare
from fedmitr_flwr.runs import evaluation
from fedmitr_flwr.runs.evaluation import evaluate

CPU = torch.device("cpu")


def by_brightness(images: Tensor) -> Tensor:
    """Scores of three classes from the first pixel of normalised grey images: -1, 0 and 1 are classes 0, 1 and 2."""
    first = images[:, 0, 0, 0].round()
    return torch.stack([-first, -first.abs() + 0.5, first], dim=1) * 2


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_by_hand(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels for the classes 0 0 1 1 2 2; labels 0 1 1 1 0 0: right are the first, third and fourth."""
    monkeypatch.setattr(evaluation, "BATCH", batch_size)
    values = torch.tensor([0, 0, 128, 128, 255, 255], dtype=torch.uint8)
    six = Images(values[:, None, None, None].expand(-1, 1, 4, 4), torch.tensor([0, 1, 1, 1, 0, 0]))
    found = evaluate(by_brightness, six, small(4, num_classes=3), CPU)
    assert (found.accuracy, found.num_examples) == (50.0, 6)
    assert found.per_class == pytest.approx((100 / 3, 200 / 3, math.nan), nan_ok=True)
    assert found.confusion == ((1, 0, 2), (1, 2, 0), (0, 0, 0))
    # The scores are (2, -1, -2), (0, 1, 0) and (-2, -1, 2); minus the log of softmax at the label, by hand.
    dark, grey = math.log(math.exp(2) + math.exp(-1) + math.exp(-2)), math.log(2 + math.e)
    wanted = ((dark - 2) + (dark + 1) + 2 * (grey - 1) + 2 * (dark + 2)) / 6
    assert found.loss == pytest.approx(wanted, rel=1e-5)


def test_images_arrive_resized_and_normalised(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 20)
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        assert not torch.is_grad_enabled()
        return torch.zeros(len(images), 3)

    found = evaluate(predict, tiny.test, small(12, num_classes=3), CPU)
    assert [tuple(batch.shape) for batch in seen] == [(20, 1, 12, 12), (10, 1, 12, 12)]
    assert torch.equal(torch.cat(seen), prepare(tiny.test.pixels, small(12)))
    assert (found.accuracy, found.loss) == (pytest.approx(100 / 3), pytest.approx(math.log(3)))

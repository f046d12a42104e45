"""Accuracy, loss and recall by hand, whatever the batch size; where there is no image of a class there is no recall."""

import math

import pytest
import torch
from tiny import a_vit, settings, small
from torch import Tensor

from fedmitr_flwr.data.images import DataSet, Images, prepare
from fedmitr_flwr.runs import evaluation
from fedmitr_flwr.runs.evaluation import Evaluation, evaluate

CPU = torch.device("cpu")


def by_brightness(images: Tensor) -> Tensor:
    """Scores of three classes from the first pixel of normalised grey images: -1, 0 and 1 are classes 0, 1 and 2."""
    first = images[:, 0, 0, 0].round()
    return torch.stack([-first, -first.abs() + 0.5, first], dim=1) * 2


def six() -> Images:
    """Pixels for the classes 0 0 1 1 2 2; labels 0 1 1 1 0 0: right are the first, third and fourth."""
    values = torch.tensor([0, 0, 128, 128, 255, 255], dtype=torch.uint8)
    return Images(values[:, None, None, None].expand(-1, 1, 4, 4), torch.tensor([0, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_by_hand(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", batch_size)
    found = evaluate(by_brightness, six(), small(4, num_classes=3), CPU)
    assert found.accuracy == 50.0
    assert found.num_examples == 6
    assert found.per_class[0] == pytest.approx(100 / 3)
    assert found.per_class[1] == pytest.approx(200 / 3)
    assert math.isnan(found.per_class[2])
    assert found.confusion == ((1, 0, 2), (1, 2, 0), (0, 0, 0))  # labels 0 1 1 1 0 0, answers 0 0 1 1 2 2
    # The scores are (2, -1, -2), (0, 1, 0) and (-2, -1, 2); minus the log of softmax at the label, by hand.
    dark = math.log(math.exp(2) + math.exp(-1) + math.exp(-2))
    grey = math.log(2 + math.e)
    wanted = ((dark - 2) + (dark + 1) + 2 * (grey - 1) + 2 * (dark + 2)) / 6
    assert found.loss == pytest.approx(wanted, rel=1e-5)


def test_images_arrive_resized_and_normalised(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 20)
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 3)

    found = evaluate(predict, tiny.test, small(12, num_classes=3), CPU)
    assert [tuple(batch.shape) for batch in seen] == [(20, 1, 12, 12), (10, 1, 12, 12)]
    assert torch.equal(torch.cat(seen), prepare(tiny.test.pixels, small(12)))
    third, confusion = pytest.approx(100 / 3), ((10, 0, 0),) * 3
    assert found == Evaluation(third, pytest.approx(math.log(3)), (100.0, 0.0, 0.0), 30, confusion)


def test_scores_need_not_be_normalised_and_no_graph_is_built(tiny: DataSet) -> None:
    vit = a_vit(settings(**{"model.num-classes": 3}), 0)
    recorded: list[bool] = []

    def moved(images: Tensor) -> Tensor:
        scores = vit(images)
        recorded.append(scores.requires_grad)
        return scores.double() + 5

    plain, shifted = (evaluate(predict, tiny.test, small(num_classes=3), CPU) for predict in (vit, moved))
    assert shifted.accuracy == plain.accuracy
    assert shifted.loss == pytest.approx(plain.loss, rel=1e-5)
    assert recorded == [False]

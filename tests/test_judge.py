"""The ensemble that is only looked at is the ensemble, and needs no more memory than one of its teachers."""

import weakref

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import an_upload, settings
from torch import Tensor

from fedmitr_flwr.data.images import DataSet
from fedmitr_flwr.ensemble import teachers
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.judge import ensemble_alone, evaluate_on
from fedmitr_flwr.vit.build import vit_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("combine", ["logits", "probs"])
@pytest.mark.parametrize("weights", ["uniform", "size"])
def test_teacher_by_teacher_it_is_the_ensemble(combine: str, weights: str, tiny: DataSet) -> None:
    config = settings(**{"ensemble.combine": combine, "ensemble.weights": weights})
    uploads = [an_upload(config, client, 10 + 5 * client) for client in range(5)]
    whole = Ensemble.of(uploads, config.model, config.ensemble)
    found, wanted = ensemble_alone(uploads, tiny.test, config, CPU), evaluate_on(whole, tiny.test, config, CPU)
    assert (found.loss, found.confusion) == (wanted.loss, wanted.confusion)


def test_there_is_one_teacher_at_a_time(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[VisionTransformer]] = []
    alive: list[int] = []

    def counted(model: object, weights: dict[str, Tensor]) -> VisionTransformer:
        vit = vit_of(model, weights)  # type: ignore[arg-type]
        built.append(weakref.ref(vit))
        alive.append(sum(each() is not None for each in built))
        return vit

    monkeypatch.setattr(teachers, "vit_of", counted)
    config = settings()
    ensemble_alone([an_upload(config, client) for client in range(4)], tiny.test, config, CPU)
    assert alive == [1, 1, 1, 1]

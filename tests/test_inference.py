"""Attacks of benchmarks/inference.py: numbers by hand, a model that memorised, one that never saw the images."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from inference import attacked
from security import inference as attack

from fedmitr_flwr import Run
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images, prepare
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.runs.evaluation import scores_of
from fedmitr_flwr.vit.build import build_vit

CPU = torch.device("cpu")
TINY = {"model.name": "small", "model.img-size": 8, "model.patch-size": 4, "model.width": 16, "model.depth": 1}
TINY |= {"model.in-chans": 1, "model.num-classes": 2, "local.outliers": 0.0, "local.augment": False}


def test_power_by_hand() -> None:
    scores, member = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([True, False, True, False])
    assert attack.power(scores, member) == (75.0, 50.0)  # 3 of 4 pairs; one member is above every other image
    assert attack.power(-scores, member) == (25.0, 0.0)
    assert attack.power(torch.zeros(4), member) == (50.0, 0.0)


def test_confidence_is_the_logit_of_the_probability() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]), torch.tensor([1, 2])
    p = logits.double().softmax(1)[torch.arange(2), labels]
    torch.testing.assert_close(attack.confidence(logits, labels), (p / (1 - p)).log())


def test_the_likelihood_ratio_is_that_of_two_normals() -> None:
    member = torch.tensor([[True], [True], [False], [False]])
    shadows = torch.tensor([[3.0], [5.0], [0.0], [2.0]], dtype=torch.float64)  # means 4 and 1, both variances 2
    ratio = attack.likelihood_ratio(torch.tensor([3.0], dtype=torch.float64), shadows, member)
    normal = torch.distributions.Normal
    wanted = normal(4.0, 2**0.5).log_prob(torch.tensor(3.0)) - normal(1.0, 2**0.5).log_prob(torch.tensor(3.0))
    assert ratio.item() == pytest.approx(wanted.item())
    with pytest.raises(AssertionError, match="with it and without it"):
        attack.likelihood_ratio(torch.zeros(1), shadows, torch.ones(4, 1, dtype=torch.bool))


def test_each_image_is_in_half_of_the_models() -> None:
    member = attack.halves(6, 50, stream(0))
    assert member.sum(0).eq(3).all()
    assert member.any(0).all()
    assert len(member.unique(dim=1).T) > 10  # not always the same half


def test_sums_of_few_images_give_their_members_away() -> None:
    """Fewer images than features: the members span the moment. Many more: they are lost in it."""
    rng = torch.Generator().manual_seed(0)
    for number, least, most in ((10, 100.0, 100.0), (4000, 50.0, 55.0)):
        features = torch.randn(2 * number, 40, generator=rng)
        member = torch.arange(2 * number) < number
        moment = features[member].T @ features[member]
        scores = attack.leverage(features, moment)
        assert scores[member].max() < 1.01
        assert least <= attack.power(-scores, member).auc <= most
    unit = torch.eye(2)
    torch.testing.assert_close(attack.leverage(unit, 4 * unit), torch.full((2,), 0.25).double(), atol=1e-5, rtol=0)


def test_images_that_come_back_are_seen() -> None:
    rng = torch.Generator().manual_seed(0)
    members, unseen, foreign = torch.randn(3, 300, 8, generator=rng)
    assert attack.returned(members + 0.01, members, unseen) == 100
    assert attack.returned(unseen + 0.01, members, unseen) == 0
    assert attack.returned(foreign, members, unseen) == pytest.approx(50, abs=8)  # 2.8 standard errors
    assert attack.returned(foreign, members, members) == 50
    assert attack.nearest(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [6.0, 8.0]])).item() == 5


def noise(number: int, rng: torch.Generator) -> Images:
    """Labels by lot: who answers them right has remembered them."""
    pixels = torch.randint(256, (number, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return Images(pixels, torch.randint(2, (number,), generator=rng))


def test_a_memory_is_found_and_a_stranger_is_at_chance() -> None:
    """One image for a thousand epochs is the likeliest of all; a model that saw none of them tells nothing."""
    flat = TINY | {"local.epochs": 1000, "local.batch-size": 1, "local.optimizer": "adamw", "local.lr": 1e-3}
    config = resolve(Config.from_flat(flat))
    images, member = noise(200, torch.Generator().manual_seed(1)), torch.zeros(200, dtype=torch.bool)

    def found(vit: torch.nn.Module, member: torch.Tensor) -> attack.Power:
        return attack.power(attack.confidence(scores_of(vit, images, config.model, CPU), images.labels), member)

    vit = build_vit(config.model)
    member[0] = True
    train_local(vit, images.subset(torch.tensor([0])), config, stream(0), CPU)
    assert found(vit, member).found == 100
    assert found(build_vit(config.model).eval(), torch.arange(200) % 2 == 0).auc == pytest.approx(50, abs=12)


def test_a_run_whose_images_are_its_clients_own_gives_them_away() -> None:
    limits = {"model.num-classes": 10, "data.train-limit": 60, "data.test-limit": 30}
    config = resolve(Config.from_flat(TINY | limits))
    train = load(config.data, config.model).train
    kept = {"images": prepare(train.pixels, config.model), "targets": train.labels}
    run = SimpleNamespace(config=config, model=lambda: build_vit(config.model), images=lambda: kept)
    found = attacked(cast(Run, run))
    for kind in ("pixels", "features"):
        assert found[kind]["auc"] == found[kind]["found"] == pytest.approx(100)
    assert found["loss"]["auc"] == pytest.approx(50, abs=15)  # the student saw none

"""Estimated weights: from scouting images, then from the pool; other weights are left alone, and cost nothing."""

from typing import Any

import pytest
import torch
from tiny import a_vit, fused, settings, some_images

from fedmitr_flwr.config import Config
from fedmitr_flwr.ensemble.competence import estimate
from fedmitr_flwr.ensemble.ensemble import teacher_weights
from fedmitr_flwr.inversion import scout
from fedmitr_flwr.inversion.scout import Weigher, scouted_ensemble
from fedmitr_flwr.uploads.upload import Upload

CPU = torch.device("cpu")


def experts() -> list[Upload]:
    """Client 0 says classes 0 to 4 only, client 1 classes 5 to 9 only; which one of them, the image decides."""
    uploads = []
    for client, size in enumerate((30, 10)):
        vit = a_vit(settings(), seed=client)
        with torch.no_grad():
            vit.head.weight.mul_(3)
            vit.head.bias.fill_(-30.0)
            vit.head.bias[5 * client : 5 * client + 5] = 0.0
        weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        uploads.append(Upload(client, weights, size, 0.5, "c" * 12))
    return uploads


def weights_of(how: str, uploads: list[Upload]) -> torch.Tensor:
    config = settings(**{"ensemble.weights": how, "ensemble.combine": "probs"})
    return scouted_ensemble(uploads, config, CPU).weights


def test_scouting_finds_who_knows_which_class() -> None:
    found = weights_of("estimated", experts())
    torch.testing.assert_close(found.sum(0), torch.ones(10))
    assert (found[0, :5] > 0.85).all()  # by size: 0.75
    assert (found[1, 5:] > 0.5).all()  # by size: 0.25


def test_equal_teachers_are_weighted_by_size() -> None:
    one = experts()[0]
    twin = Upload(1, one.weights, 10, 0.5, "c" * 12)
    torch.testing.assert_close(weights_of("estimated", [one, twin]), torch.tensor([[0.75], [0.25]]).expand(2, 10))


@pytest.mark.parametrize("how", ["uniform", "size"])
def test_other_weights_need_no_images(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scout, "invert", lambda *_args, **_more: pytest.fail("made images"))
    assert torch.equal(weights_of(how, experts()), teacher_weights(experts(), 10, how))


def test_reweighing_is_the_estimate_from_these_images() -> None:
    config = settings(**{"ensemble.weights": "estimated"})
    weigher, images, targets = Weigher(experts(), config, CPU), some_images(config, 30), torch.arange(30) % 10
    with torch.no_grad():
        answers = torch.stack([teacher(images).softmax(1) for teacher in weigher.ensemble.teachers.residents])
    weigher.refine(images, targets)
    torch.testing.assert_close(weigher.ensemble.weights, estimate(answers, torch.tensor([30.0, 10.0]), targets))


def estimated(**changes: object) -> Config:
    return settings(**{"ensemble.weights": "estimated", "ensemble.combine": "probs"} | changes)


def test_the_method_weighs_anew_by_its_pool_and_says_how_in_the_end() -> None:
    made = fused(estimated(), experts())
    answers = made.ensemble.probabilities(made.pool.images)
    wanted = estimate(answers, torch.tensor([30.0, 10.0]), made.pool.targets)
    torch.testing.assert_close(made.ensemble.weights, wanted)
    kept = fused(estimated(method="ensemble"), experts())
    assert kept.ensemble is kept.predict


def test_routing_asks_half_of_two_experts() -> None:
    log: list[dict[str, Any]] = []
    routed = estimated(**{"inversion.route": 0.9, "distill.rounds": 2, "inversion.batch-size": 5})
    made = fused(routed, experts(), log)
    asked = [line["teachers_asked"] for line in log if line["stage"] == "inversion"]
    assert asked == [pytest.approx(0.5)] * 4
    batches = made.pool.targets.split(5)
    assert all((batch.sort().values == batch).all() for batch in batches)  # of few classes each
    unrouted: list[dict[str, Any]] = []
    fused(estimated(), experts(), unrouted)
    assert [line["teachers_asked"] for line in unrouted if line["stage"] == "inversion"] == [1.0]

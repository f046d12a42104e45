"""Weights by class from answers on synthetic images: by hand, by known counts, and of scouting images and the pool."""

from typing import Any

import pytest
import torch
from tiny import CPU, an_upload, fused, settings
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.ensemble.competence import competence, estimate, evidence, tells_apart
from fedmitr_flwr.ensemble.ensemble import teacher_weights
from fedmitr_flwr.inversion import scout
from fedmitr_flwr.inversion.scout import scouted_ensemble
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import vit_of

CLASSES = 6
HALVES = torch.full((2, 1), 0.5)


def by_size(sizes: Tensor) -> Tensor:
    return (sizes / sizes.sum())[:, None].expand(-1, CLASSES)


def random_answers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sure and unsure teachers, none of them right more often than by chance or by habit."""
    rng = stream(seed, "answers")
    habits = 2 * torch.randn(4, 1, CLASSES, generator=rng)
    targets = torch.randint(CLASSES, (60,), generator=rng)
    knows = 4 * torch.rand(4, CLASSES, generator=rng)[:, targets, None] * torch.eye(CLASSES)[targets]
    logits = knows + habits + torch.randn(4, 60, CLASSES, generator=rng)
    return logits.softmax(-1), torch.randint(10, 200, (4,), generator=rng).float(), targets


def tilted(counts: Tensor, apart: float) -> tuple[Tensor, Tensor]:
    """Teachers that answer with Bayes' rule: normal classes `apart` from each other, and their own class priors."""
    classes = counts.shape[1]
    targets = torch.arange(1200) % classes
    centres = torch.eye(classes) * apart
    points = centres[targets] + torch.randn(1200, classes, generator=stream(0, "points"))
    likelihoods = -(points[:, None] - centres).square().sum(-1) / 2
    return (likelihoods + counts.log()[:, None]).softmax(-1), targets


def right(weights: Tensor, answers: Tensor, targets: Tensor) -> int:
    return int(((weights[:, None] * answers).sum(0).argmax(1) == targets).sum())


def test_by_hand() -> None:
    """Two equal clients, two classes, four images of each; each is sure of one class and undecided about the other.

    r = (4 · 1 + 3/4) / 5 = 0.95 and (4 · 1/2 + 3/4) / 5 = 0.55, mean 3/4 for both classes.
    ρ: between (0.2)² = 0.04, chance (0.95 · 0.05 + 0.55 · 0.45) / 4 / 5 = 0.01475, all 3/4 · 1/4 = 0.1875.
    Every mixture gets all images right, so λ = ρ; the competent one's share is 0.95³ / (0.95³ + 0.55³).
    """
    answers = torch.tensor([[[1.0, 0.0]] * 4 + [[0.5, 0.5]] * 4, [[0.5, 0.5]] * 4 + [[0.0, 1.0]] * 4])
    targets = torch.tensor([0] * 4 + [1] * 4)
    found = competence(answers, HALVES, targets)
    torch.testing.assert_close(found, torch.tensor([[0.95, 0.55], [0.55, 0.95]]))
    rho = evidence(found, HALVES, torch.tensor([4, 4]))
    assert rho.item() == pytest.approx((0.04 - 0.01475) / 0.1875, rel=1e-5)
    sure = 0.5 + rho.item() * (0.95**3 / (0.95**3 + 0.55**3) - 0.5)
    weights = estimate(answers, torch.tensor([30.0, 30.0]), targets)
    torch.testing.assert_close(weights, torch.tensor([[sure, 1 - sure], [1 - sure, sure]]))


def test_what_a_teacher_says_of_other_images_too_is_no_knowledge_by_hand() -> None:
    """0.8 of its images and 0.6 of others: 0.2 / (0.3 · 0.8); 1 of all images: nothing; 0.8 and 0.5: enough."""
    says = torch.tensor([[[0.8, 0.2]] * 2 + [[0.6, 0.4]] * 2, [[1.0, 0.0]] * 4, [[0.8, 0.2]] * 2 + [[0.5, 0.5]] * 2])
    found = tells_apart(says, torch.tensor([[0.8, 0.4], [1.0, 0.0], [0.8, 0.5]]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([[0.2 / 0.24, 1.0], [0.0, 0.0], [1.0, 1.0]]))


def test_a_client_of_one_class_does_not_hide_all_others() -> None:
    """It says its class of everything; those that tell classes apart know no more of its class than half the truth."""
    targets = torch.arange(400) % 4
    truth, one = torch.eye(4)[targets], torch.eye(4)[torch.zeros(400, dtype=torch.long)]
    other = 0.1 * truth + 0.9 * (truth * torch.tensor([0.5, 1, 1, 1]) + torch.tensor([0.0, 0.2, 0.2, 0.2]))
    answers = torch.stack([one, *[other / other.sum(1, keepdim=True)] * 3])
    weights = estimate(answers, torch.full((4,), 100.0), targets)
    assert weights[0, 0] <= 0.25
    assert right(weights, answers, targets) == 400


def test_known_class_counts_are_found_where_each_class_has_one_owner() -> None:
    """Or owners that know it equally well: their sizes count then."""
    counts = torch.tensor([[60.0, 60, 0, 0, 0, 0], [0, 0, 20, 30, 0, 0], [0, 0, 0, 0, 90, 40]])
    answers, targets = tilted(counts, apart=6.0)
    found = estimate(answers, counts.sum(1), targets)
    torch.testing.assert_close(found, counts / counts.sum(0), atol=0.03, rtol=0)
    again = estimate(answers[[0, 0, 1, 2]], torch.tensor([10.0, 30.0, 20.0, 20.0]), targets)
    torch.testing.assert_close(again[:, 0], torch.tensor([0.25, 0.75, 0.0, 0.0]), atol=0.03, rtol=0)


def test_tilted_teachers_are_weighted_towards_their_counts() -> None:
    """Also where every client has every class and the classes overlap."""
    rows = [90.0, 5, 5, 1, 20, 2], [5, 80, 5, 40, 1, 2], [5, 5, 60, 40, 20, 3], [1, 10, 30, 20, 160, 90]
    counts = torch.tensor(rows)
    answers, targets = tilted(counts, apart=0.7)
    weights, wanted, start = estimate(answers, counts.sum(1), targets), counts / counts.sum(0), by_size(counts.sum(1))
    assert (weights - wanted).abs().mean() < 0.7 * (start - wanted).abs().mean()
    assert ((weights - start).sign() == (wanted - start).sign()).float().mean() > 0.85


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_teachers_and_of_classes_does_not_matter(seed: int) -> None:
    answers, sizes, targets = random_answers(seed)
    weights = estimate(answers, sizes, targets)
    torch.testing.assert_close(weights.sum(0), torch.ones(CLASSES))
    assert (weights >= 0).all()
    teachers, classes, images = (torch.randperm(size, generator=stream(seed, size)) for size in (4, CLASSES, 60))
    renamed = classes.argsort()[targets[images]]  # class classes[j] is now called j
    permuted = estimate(answers[teachers][:, images][:, :, classes], sizes[teachers], renamed)
    torch.testing.assert_close(permuted, weights[teachers][:, classes])


def test_without_evidence_teachers_are_weighted_by_size() -> None:
    """Equal teachers, an empty pool, a class without images, one that nobody knows, and differences by chance."""
    answers, sizes, targets = random_answers()
    assert torch.equal(estimate(answers[:1].expand(4, -1, -1), sizes, targets), by_size(sizes))
    assert torch.equal(estimate(answers[:, :0], sizes, targets[:0]), by_size(sizes))
    answers[:, :, 3] = 0
    kept = targets != 2
    weights = estimate(answers[:, kept], sizes, targets[kept])
    torch.testing.assert_close(weights[:, 2:4], by_size(sizes)[:, 2:4])
    assert not torch.allclose(weights[:, 1], by_size(sizes)[:, 1], atol=0.05)
    targets = torch.arange(240) % CLASSES  # as under IID data: all know each class equally well, and err elsewhere
    knows = torch.rand(4, 240, 1, generator=stream(0)) < 0.8
    answers = torch.where(knows, torch.eye(CLASSES)[targets], torch.full((CLASSES,), 1 / CLASSES))
    torch.testing.assert_close(estimate(answers, sizes, targets), by_size(sizes), atol=0.01, rtol=0)


def test_evidence_grows_with_the_pool() -> None:
    """One always says 0, the other always 1: no evidence in no image, all in the limit, and in between by hand.

    One image: r = 3/4 and 1/4, between 1/16, chance 2 · 1/4 · 3/16 / 2 = 3/64, all 1/4.
    """
    found = []
    for images in (0, 1, 10, 1000):
        targets = torch.arange(2).repeat_interleave(images)
        known = competence(torch.eye(2)[:, None].expand(-1, len(targets), -1), HALVES, targets)
        found.append(evidence(known, HALVES, torch.tensor([images, images])).item())
    assert found[:2] == pytest.approx([0, (1 / 16 - 3 / 64) / (1 / 4)])
    assert found == sorted(found)
    assert found[3] > 0.99


def test_no_image_of_the_pool_is_lost() -> None:
    """The mixture never gets fewer images right than by size, though with all the evidence it sometimes would."""
    held_back = 0
    for seed in range(40):
        answers, sizes, targets = random_answers(seed)
        by_sizes = right(by_size(sizes), answers, targets)
        assert right(estimate(answers, sizes, targets), answers, targets) >= by_sizes
        shares = (sizes / sizes.sum())[:, None]
        known = competence(answers, shares, targets)
        rho = evidence(known, shares, torch.bincount(targets, minlength=CLASSES))
        sharp = shares * known**3
        held_back += right(torch.lerp(by_size(sizes), sharp / sharp.sum(0), rho), answers, targets) < by_sizes
    assert held_back > 0


def experts() -> list[Upload]:
    """Client 0 says classes 0 to 4 only, client 1 classes 5 to 9 only; which one of them, the image decides."""
    uploads = [an_upload(settings(), client, size) for client, size in enumerate((30, 10))]
    for upload in uploads:
        upload.weights["head.weight"] *= 3
        upload.weights["head.bias"].fill_(-30.0)[5 * upload.client : 5 * upload.client + 5] = 0.0
    return uploads


def estimated(**changes: object) -> Config:
    return settings(**{"ensemble.weights": "estimated", "ensemble.combine": "probs"} | changes)


def test_scouting_finds_who_knows_which_class() -> None:
    found = scouted_ensemble(experts(), estimated(**{"inversion.batch-size": 100}), CPU).weights
    torch.testing.assert_close(found.sum(0), torch.ones(10))
    assert (found[0, :5] > 0.85).all()  # by size: 0.75
    assert (found[1, 5:] > 0.5).all()  # by size: 0.25


def test_other_weights_need_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scout, "invert", lambda *_args, **_more: pytest.fail("made images"))
    for how in ("uniform", "size"):
        found = scouted_ensemble(experts(), estimated(**{"ensemble.weights": how}), CPU).weights
        assert torch.equal(found, teacher_weights(experts(), 10, how))


def test_the_method_weighs_anew_by_its_pool_and_says_how_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scout, "IMAGES_PER_CLASS", 1)
    made, uploads = fused(estimated(), experts()), experts()
    with torch.no_grad():
        answers = torch.stack([vit_of(settings().model, each.weights)(made.pool.images).softmax(1) for each in uploads])
    wanted = estimate(answers, torch.tensor([30.0, 10.0]), made.pool.targets)
    torch.testing.assert_close(made.ensemble.weights, wanted)
    kept = fused(estimated(method="ensemble"), experts())
    assert kept.ensemble is kept.predict


def test_routing_asks_half_of_two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scout, "IMAGES_PER_CLASS", 2)
    routed, shares = {"inversion.route": 0.9, "distill.rounds": 2, "inversion.batch-size": 5}, list[list[float]]()
    for changes in (routed, {}):
        log: list[dict[str, Any]] = []
        made = fused(estimated(**changes), experts(), log)
        shares.append([line["teachers_asked"] for line in log if line["stage"] == "inversion"])
        batches = made.pool.targets.split(5)
        assert all((batch.sort().values == batch).all() for batch in batches) == bool(changes)  # of few classes each
    assert shares == [[pytest.approx(0.5)] * 4, [1.0]]

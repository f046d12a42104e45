"""Weights by class from answers on synthetic images: by hand, by known counts, in any order, never without evidence."""

import pytest
import torch
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble.competence import competence, estimate, evidence, tells_apart

CLASSES = 6


def by_size(sizes: Tensor, classes: int = CLASSES) -> Tensor:
    return (sizes / sizes.sum())[:, None].expand(-1, classes)


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
    halves = torch.full((2, 1), 0.5)
    found = competence(answers, halves, targets)
    torch.testing.assert_close(found, torch.tensor([[0.95, 0.55], [0.55, 0.95]]))
    rho = evidence(found, halves, torch.tensor([4, 4]))
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
    truth = torch.eye(4)[targets]
    one = torch.eye(4)[torch.zeros(400, dtype=torch.long)]
    other = 0.1 * truth + 0.9 * (truth * torch.tensor([0.5, 1, 1, 1]) + torch.tensor([0.0, 0.2, 0.2, 0.2]))
    answers = torch.stack([one, *[other / other.sum(1, keepdim=True)] * 3])
    sizes = torch.tensor([100.0, 100.0, 100.0, 100.0])
    weights = estimate(answers, sizes, targets)
    assert weights[0, 0] <= 0.25
    assert right(weights, answers, targets) == 400
    alone = torch.tensor([[1.0, 0, 0, 0], *[[0.0, 1 / 3, 1 / 3, 1 / 3]] * 3])
    assert right(alone, answers, targets) == 100


def test_size_counts_between_teachers_of_equal_competence() -> None:
    """Two that know class 0 and one that does not: λ = 1 in the limit, so 10 : 30 : 0."""
    knows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # what each says of class 0
    answers = torch.stack([knows, 1 - knows], 1).repeat_interleave(5000, 1)
    targets = torch.arange(2).repeat_interleave(5000)
    weights = estimate(answers, torch.tensor([10.0, 30.0, 20.0]), targets)
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.25, 0.75, 0.0]), atol=1e-3, rtol=0)


def test_known_class_counts_are_found_where_each_class_has_one_owner() -> None:
    counts = torch.tensor([[60.0, 60, 0, 0, 0, 0], [0, 0, 20, 30, 0, 0], [0, 0, 0, 0, 90, 40]])
    answers, targets = tilted(counts, apart=6.0)
    weights = estimate(answers, counts.sum(1), targets)
    torch.testing.assert_close(weights, counts / counts.sum(0), atol=0.03, rtol=0)
    assert (by_size(counts.sum(1)) - counts / counts.sum(0)).abs().max() > 0.5


def test_tilted_teachers_are_weighted_towards_their_counts() -> None:
    """Also where every client has every class and the classes overlap."""
    counts = torch.tensor(
        [[90.0, 5, 5, 1, 20, 2], [5, 80, 5, 40, 1, 2], [5, 5, 60, 40, 20, 3], [1, 10, 30, 20, 160, 90]]
    )
    answers, targets = tilted(counts, apart=0.7)
    weights, wanted = estimate(answers, counts.sum(1), targets), counts / counts.sum(0)
    start = by_size(counts.sum(1))
    assert (weights - wanted).abs().mean() < 0.7 * (start - wanted).abs().mean()
    assert ((weights - start).sign() == (wanted - start).sign()).float().mean() > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_teachers_and_of_classes_does_not_matter(seed: int) -> None:
    answers, sizes, targets = random_answers(seed=seed)
    weights = estimate(answers, sizes, targets)
    torch.testing.assert_close(weights.sum(0), torch.ones(CLASSES))
    assert (weights >= 0).all()
    teachers, classes = torch.randperm(4, generator=stream(seed)), torch.randperm(CLASSES, generator=stream(seed + 1))
    renamed = classes.argsort()[targets]  # class classes[j] is now called j
    permuted = estimate(answers[teachers][:, :, classes], sizes[teachers], renamed)
    torch.testing.assert_close(permuted, weights[teachers][:, classes])
    shuffled = torch.randperm(len(targets), generator=stream(seed + 2))
    torch.testing.assert_close(estimate(answers[:, shuffled], sizes, targets[shuffled]), weights)


def test_equal_teachers_are_weighted_by_size() -> None:
    answers, sizes, targets = random_answers()
    same = answers[:1].expand(4, -1, -1)
    assert torch.equal(estimate(same, sizes, targets), by_size(sizes))


def test_teachers_that_differ_by_chance_alone_are_weighted_by_size() -> None:
    """As under IID data: all know each class equally well, and err on different images."""
    targets = torch.arange(240) % CLASSES
    knows = torch.rand(5, 240, generator=stream(0)) < 0.8
    answers = torch.where(knows[..., None], torch.eye(CLASSES)[targets], torch.full((CLASSES,), 1 / CLASSES))
    sizes = torch.tensor([10.0, 20, 30, 40, 50])
    torch.testing.assert_close(estimate(answers, sizes, targets), by_size(sizes), atol=0.01, rtol=0)


def test_evidence_grows_with_the_pool() -> None:
    """One always says 0, the other always 1: no evidence in no image, all in the limit, and in between by hand.

    One image: r = 3/4 and 1/4, between 1/16, chance 2 · 1/4 · 3/16 / 2 = 3/64, all 1/4.
    """
    halves = torch.full((2, 1), 0.5)
    found = []
    for images in (0, 1, 10, 1000):
        targets = torch.arange(2).repeat_interleave(images)
        answers = torch.eye(2)[:, None].expand(-1, len(targets), -1)
        known = competence(answers, halves, targets)
        found.append(evidence(known, halves, torch.tensor([images, images])).item())
    assert found[:2] == pytest.approx([0, (1 / 16 - 3 / 64) / (1 / 4)])
    assert found == sorted(found)
    assert found[3] > 0.99


def test_an_empty_pool_is_no_evidence() -> None:
    sizes = torch.tensor([10.0, 20.0])
    assert torch.equal(estimate(torch.zeros(2, 0, 3), sizes, torch.zeros(0, dtype=torch.int64)), by_size(sizes, 3))


def test_a_class_without_images_and_one_that_nobody_knows_are_weighted_by_size() -> None:
    answers, sizes, targets = random_answers()
    answers[:, :, 3] = 0
    kept = targets != 2
    weights = estimate(answers[:, kept], sizes, targets[kept])
    torch.testing.assert_close(weights[:, 2:4], by_size(sizes)[:, 2:4])
    assert not torch.allclose(weights[:, 1], by_size(sizes)[:, 1], atol=0.05)


def test_no_image_of_the_pool_is_lost() -> None:
    """The mixture never gets fewer images right than by size, though with all the evidence it sometimes would."""
    held_back = 0
    for seed in range(40):
        answers, sizes, targets = random_answers(seed=seed)
        start = by_size(sizes)
        assert right(estimate(answers, sizes, targets), answers, targets) >= right(start, answers, targets)
        shares = (sizes / sizes.sum())[:, None]
        known = competence(answers, shares, targets)
        rho = evidence(known, shares, torch.bincount(targets, minlength=CLASSES))
        sharp = shares * known**3
        boldly = torch.lerp(start, sharp / sharp.sum(0), rho)
        held_back += right(boldly, answers, targets) < right(start, answers, targets)
    assert held_back > 0


def test_half_precision_answers_and_whole_numbers_of_images_will_do() -> None:
    answers, sizes, targets = random_answers()
    weights = estimate(answers.half(), sizes.long(), targets)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, estimate(answers, sizes, targets), atol=0.05, rtol=0)

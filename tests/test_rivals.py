"""F-ADI, DENSE and Co-Boosting: their losses by hand, their limits, and what they have in common with FedMITR."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import a_vit, an_ensemble, fused, same, settings, some_images, two_uploads
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr import methods
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.data.images import value_range
from fedmitr_flwr.distillation import distil, losses
from fedmitr_flwr.distillation.losses import soft_divergence
from fedmitr_flwr.ensemble.ensemble import combine_answers
from fedmitr_flwr.inversion import generator
from fedmitr_flwr.inversion.generator import Generator, generate
from fedmitr_flwr.inversion.invert import PIXELS
from fedmitr_flwr.methods import adi, coboosting
from fedmitr_flwr.methods.coboosting import diversify, hard_loss, learn, moved, slope
from fedmitr_flwr.methods.contract import Fused, Job
from fedmitr_flwr.methods.dense import boundary_loss
from fedmitr_flwr.vit.names import normalisation
from fedmitr_flwr.vit.tokens import all_positions, patchify

WAYS = ("logits", "probs")
RIVALS = ("adi", "dense", "coboosting")
# Two images of two classes. Ensemble: p = (3/4, 1/4) on both; student: (1/4, 3/4), which differs, and (1/2 + , 1/2 -).
SCORES = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
STUDENT = torch.tensor([[1.0, 3.0], [2.0, 1.0]]).log()
TARGETS = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def _small_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.inversion.scout.IMAGES_PER_CLASS", 1)
    for name, value in {"STEPS": 4, "WIDTH": 4, "LATENT": 8}.items():
        monkeypatch.setattr(generator, name, value)


def cross_entropies(scores: Tensor, _student: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets, reduction="none")


def test_the_boundary_loss_by_hand() -> None:
    """CE: -log 3/4 and -log 1/4. KL of the first: 3/4 log 3 + 1/4 log 1/3 = log(3) / 2. The second agrees: no term."""
    found = boundary_loss(SCORES, STUDENT, TARGETS)
    assert found.tolist() == pytest.approx([math.log(4 / 3) - math.log(3) / 2, math.log(4)], abs=1e-6)


def test_the_hard_loss_by_hand() -> None:
    """(1/4)·log(4/3) and (3/4)·log 4, less the divergence at temperature 3 on both images."""
    scores = SCORES.clone().requires_grad_()
    plain = hard_loss(scores, SCORES, TARGETS)
    assert plain.tolist() == pytest.approx([math.log(4 / 3) / 4, 3 * math.log(4) / 4])
    wanted, given = (SCORES / 3).softmax(1), (STUDENT / 3).softmax(1)
    apart = 9 * (wanted * (wanted / given).log()).sum(1)
    assert (apart > 0.01).all()
    torch.testing.assert_close(hard_loss(SCORES, STUDENT, TARGETS), plain - apart)
    # Where the student agrees, the divergence has no slope: dCE/dz = p - one-hot, times the constant 1 - p_y.
    (slope,) = torch.autograd.grad(plain.sum(), scores)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 1.0], [9.0, -9.0]]) / 16)
    impossible = torch.tensor([[-60.0, 60.0], [60.0, -60.0]])  # probability 0: hardness 1
    assert torch.equal(hard_loss(impossible, impossible, TARGETS), cross_entropies(impossible, impossible, TARGETS))


@pytest.mark.parametrize(
    ("size", "chans", "patch", "coarse"), [(32, 3, 4, 8), (224, 3, 16, 7), (30, 3, 5, 8), (8, 1, 2, 2), (3, 1, 3, 1)]
)
def test_generated_images_have_the_shape_and_range_of_pictures(size: int, chans: int, patch: int, coarse: int) -> None:
    """32 pixels come from 8."""
    config = settings(**{"model.img-size": size, "model.in-chans": chans, "model.patch-size": patch})
    assert Generator(config.model).coarse == coarse
    images = Generator(config.model)(100 * torch.randn(2, 8, generator=stream(0)))
    assert images.shape == (2, chans, size, size)
    mean, std = (each[:, None, None] for each in normalisation(config.model))
    grey = images * std + mean
    assert ((grey >= -1e-6) & (grey <= 1 + 1e-6)).all()
    limits = torch.stack(value_range(config.model))
    torch.testing.assert_close(limits * std.flatten() + mean.flatten(), torch.tensor([[0.0], [1.0]]).expand(2, chans))


def test_a_generator_lowers_its_loss_and_gives_back_the_best_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the adversarial term they lie further from the student than without."""
    for name, value in {"STEPS": 25, "LR": 0.01, "WIDTH": 32}.items():
        monkeypatch.setattr(generator, name, value)
    config, losses, targets = settings(), list[float](), torch.arange(20) % 10
    ensemble, student = an_ensemble(config), a_vit(config, 9)

    def hard(scores: Tensor, student: Tensor, targets: Tensor) -> Tensor:
        return cross_entropies(scores, student, targets) - 3 * soft_divergence(scores, student, 3.0)

    made, harder = (
        generate(ensemble, student, config, loss, targets, stream(0), log)
        for loss, log in ((cross_entropies, lambda loss, _: losses.append(loss)), (hard, None))
    )
    assert len(losses) == 25
    assert min(losses) < 0.7 * losses[0]
    assert made.loss.mean().item() == min(losses)
    scores = ensemble(made.images)  # the images that are given back have the loss that is told
    torch.testing.assert_close(made.loss, cross_entropies(scores, scores, targets), rtol=1e-4, atol=1e-4)
    assert made.alive.all()
    assert made.images.std(0).mean() > 0.01  # not one image for all
    apart, further = (soft_divergence(ensemble(x.images), student(x.images), 3.0).mean() for x in (made, harder))
    assert further > 1.5 * apart
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_generated_batch_too_large_for_the_memory_is_made_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "STEPS", 1)
    seen: list[int] = []

    def hungry(scores: Tensor, student: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        if len(targets) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return boundary_loss(scores, student, targets)

    made = generate(an_ensemble(settings()), a_vit(settings(), 9), settings(), hungry, torch.arange(7), stream(0))
    assert seen == [7, 3, 4]
    assert made.targets.tolist() == list(range(7))


@pytest.mark.parametrize("chans", [1, 3])
def test_diversified_images_move_by_so_many_grey_levels(chans: int) -> None:
    config = settings(**{"model.in-chans": chans})
    low, high = (limit.repeat_interleave(4) for limit in value_range(config.model))
    patches = patchify(some_images(config, 6), 2).clamp(low, high)
    asked = an_ensemble(config), patches, all_positions(patches)
    moved, again = (diversify(*asked, stream(seed), config.model) for seed in range(2))
    assert not torch.equal(moved, again)
    greys = ((moved - patches) * normalisation(config.model)[1].repeat_interleave(4) * 255).abs()
    inside = (moved > low) & (moved < high)
    assert inside.float().mean() > 0.5
    assert ((greys - 8).abs() < 1e-3)[inside].all()
    assert (greys[~inside] <= 8.001).all()
    assert ((moved >= low) & (moved <= high)).all()


def test_diversified_images_turn_the_answer_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """uᵀ softmax(A/T) rises for almost every image: the sign of the slope is a direction of ascent."""
    monkeypatch.setattr(coboosting, "PERTURB", 2.0)
    config = settings()
    ensemble, patches = an_ensemble(config), patchify(0.5 * some_images(config, 12), 2)
    moved = diversify(ensemble, patches, all_positions(patches), stream(3), config.model)
    directions = 2 * torch.rand(12, 10, generator=stream(3)) - 1
    said = (ensemble.scores(each, all_positions(each)).cls.div(4).softmax(-1) for each in (moved, patches))
    after, before = ((directions * answers).sum(-1) for answers in said)
    assert (after > before).float().mean() > 0.9


def made_by(method: str, log: list[dict[str, Any]] | None = None, **changes: object) -> Fused:
    return fused(settings(**{"method": method, "distill.rounds": 2} | changes), lines=log)


@cache
def published(method: str) -> tuple[Fused, list[dict[str, Any]]]:
    """As it is, and what it logs: to be asked for before anything is changed."""
    log: list[dict[str, Any]] = []
    return made_by(method, log, **{"inversion.batch-size": 6}), log


def alike(first: Fused, second: Fused) -> bool:
    return same(first.weights, second.weights) and torch.equal(first.pool.images, second.pool.images)


def test_adi_has_fedmitr_s_dense_images_at_its_own_rate_and_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    before, log = published("adi")
    monkeypatch.setattr(adi, "PIXELS", PIXELS)
    batches = {"inversion.batch-size": 6}
    made, fedmitr = made_by("adi", **batches), made_by("fedmitr", **batches, **{"inversion.mode": "dense"})
    assert torch.equal(made.pool.images, fedmitr.pool.images)
    assert not torch.equal(before.pool.images, made.pool.images)
    assert not alike(made, fedmitr)  # whose student has other lessons
    assert all(line["low"] == line["high"] == 0 for line in log if line["stage"] == "distillation")


@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_are_repeatable_whatever_is_fedmitr_s_own(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"relabel.mode": "drop", "inversion.mode": "pri4", "inversion.stops": "0.5", "distill.init": "classwise"}
    theirs |= {"inversion.batch-size": 6}
    bare, _ = published(rival)
    torch.manual_seed(2)
    for name, value in {"HIGH": 3.0, "TOKEN": 2.0, "TEMPERATURE": 9.0, "LOW_TEMPERATURE": 9.0}.items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(distil, "KEEP", 0.4)
    assert alike(bare, made_by(rival, **theirs))
    assert not alike(bare, made_by(rival, **theirs, seed=1))


def test_coboosting_without_its_three_ideas_is_dense_without_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each of its numbers changes it."""
    (whole, _), (dense, _) = published("coboosting"), published("dense")
    assert not alike(whole, dense)
    for name in ("PERTURB", "STEP"):
        with monkeypatch.context() as patch:
            patch.setattr(coboosting, name, 0.0)
            assert not alike(whole, made_by("coboosting", **{"inversion.batch-size": 6}))
    monkeypatch.setattr(coboosting, "STEP", 0.0)
    monkeypatch.setattr(coboosting, "diversify", lambda _ensemble, patches, *_, **__: patches)
    monkeypatch.setattr(coboosting, "hard_loss", boundary_loss)
    uniform = {"ensemble.weights": "uniform"}
    assert alike(made_by("coboosting", **uniform), made_by("dense", **uniform))


@pytest.mark.parametrize(("rival", "route"), [("adi", 0.5), ("dense", 0.5), ("coboosting", 0.0)])
def test_colour_and_routes(rival: str, route: float) -> None:
    changes = {"model.in-chans": 3, "model.img-size": 12, "model.patch-size": 4, "data.flip": True}
    changes |= {"ensemble.weights": "estimated", "ensemble.combine": "probs"}
    made = made_by(rival, **changes, **{"inversion.route": route})
    assert all(tensor.isfinite().all() for tensor in made.weights.values())
    assert made.pool.images.shape == (20, 3, 12, 12)


def test_one_weight_for_all_classes_routes_nothing() -> None:
    config = settings(method="coboosting", **{"ensemble.weights": "estimated", "inversion.route": 0.5})
    with pytest.raises(ConfigError, match=r"learns one for each teacher; set inversion.route = 0"):
        methods.check(config)


@pytest.mark.parametrize(
    ("rival", "stage"), [("adi", "inversion"), ("dense", "generation"), ("coboosting", "generation")]
)
def test_the_pool_grows_and_the_metrics_tell(rival: str, stage: str) -> None:
    made, log = published(rival)
    assert len(made.pool) == 20
    batches = [(line["round"], line["batch"]) for line in log if line["stage"] == stage]
    assert batches == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len([line for line in log if line["stage"] == "weights"]) == (2 if rival == "coboosting" else 0)
    kd = [line["kd"] for line in log if line["stage"] == "distillation"]
    assert len(kd) == 2
    assert min(kd) > 0
    json.dumps([{key: value for key, value in line.items() if key != "weights"} for line in log], allow_nan=False)


@pytest.mark.parametrize("rival", ["dense", "coboosting"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    rival: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(method=rival, **{"distill.rounds": 3})
    uploads = two_uploads(config)
    whole, make, made = fused(config, uploads), generator.generate, list[int]()

    def dies(*given: Any, **more: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise InterruptedError
        return make(*given, **more)

    monkeypatch.setattr(generator, "generate", dies)
    job = Job(uploads, config, torch.device("cpu"), lambda **_: None, work=tmp_path)
    with pytest.raises(InterruptedError):
        methods.fuse(job)
    assert len(list(tmp_path.iterdir())) == 3  # two rounds' images, and the student
    assert alike(methods.fuse(replace(job)), whole)
    assert len(made) == 4  # only the third round's images were made


def logits(*teachers: list[float]) -> Tensor:
    """(K, 1, Y): each teacher's answer on one image."""
    return torch.tensor(teachers, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("combine", WAYS)
def test_the_slope_is_that_of_the_ensemble_s_own_cross_entropy(combine: str) -> None:
    rng = stream(0)
    answers = 3 * torch.randn(4, 6, 5, generator=rng, dtype=torch.float64)
    targets, weights = torch.randint(5, (6,), generator=rng), torch.rand(4, generator=rng, dtype=torch.float64) + 0.1

    def entropy(weights: Tensor) -> float:
        shares_KY = (weights / weights.sum())[:, None].expand(-1, 5)
        return F.cross_entropy(combine_answers(answers, shares_KY, combine), targets).item()

    steps = 1e-6 * torch.eye(4, dtype=torch.float64)
    differences = [(entropy(weights + step) - entropy(weights - step)) / 2e-6 for step in steps]
    assert slope(answers, targets, weights, combine).tolist() == pytest.approx(differences, rel=1e-5, abs=1e-8)


def test_a_step_is_signed_and_clipped() -> None:
    weights = torch.tensor([0.5, 0.995, 0.004, 0.3]).double()
    found = moved(weights, torch.tensor([0.2, -7.0, 3.0, 0.0]).double(), 0.01)
    assert found.tolist() == pytest.approx([0.49, 1.0, 0.0, 0.3])
    few = torch.tensor([0.005, 0.0]).double()  # that would all vanish
    assert torch.equal(moved(few, torch.tensor([1.0, 1.0]).double(), 0.01), few)


@pytest.mark.parametrize("combine", WAYS)
def test_a_teacher_without_weight_comes_back_if_it_is_right(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope at weight 0 is finite, also where the other teacher excludes the target altogether.

    That one moves from the second step on: alone, its weight makes no difference.
    """
    monkeypatch.setattr(coboosting, "STEP", 0.1)
    monkeypatch.setattr(coboosting, "BATCH", 1)
    answers = logits([9.0, 0.0], [-900.0, 900.0]).expand(-1, 3, -1)
    found = learn(answers, torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1.0]), combine, 0, stream(0))
    assert found.tolist() == pytest.approx([0.3, 0.8])


def learned(answers: Tensor, targets: Tensor, combine: str = "probs") -> Tensor:
    weights = torch.full((len(answers),), 1 / len(answers))
    return learn(answers, targets, weights, combine, 0, stream(0))


def experts(images: int = 20) -> tuple[Tensor, Tensor]:
    """Teacher 0 is right, teacher 1 says nothing, teacher 2 is wrong: (3, M, 2) and targets (M,)."""
    targets = torch.arange(images) % 2
    right = 4 * F.one_hot(targets, 2).double()
    return torch.stack([right, torch.zeros_like(right), -right]), targets


@pytest.mark.parametrize("combine", WAYS)
def test_steps_add_up_to_the_one_who_is_right(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over 20 images in batches of 4: five steps of 0.01, all in the same direction."""
    monkeypatch.setattr(coboosting, "BATCH", 4)
    found = learned(*experts(), combine)
    assert found[0].item() == pytest.approx(1 / 3 + 0.05)
    assert found[2].item() == pytest.approx(1 / 3 - 0.05)
    assert learned(*experts(140), combine)[2] == 0


def test_equal_teachers_keep_equal_weights() -> None:
    answers, targets = experts(400)
    for count in (1, 4):
        equal = torch.full((count,), 1 / count).double()
        assert torch.equal(learned(answers[:1].expand(count, -1, -1), targets), equal)


def test_weights_are_learned_on_from_sizes_by_a_step_that_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch in each round: steps of 0.1 and 0.05 against the slope on all images so far."""
    monkeypatch.setattr(coboosting, "STEP", 0.1)
    monkeypatch.setattr(coboosting, "DECAY", 0.5)
    log: list[dict[str, Any]] = []
    made = fused(settings(method="coboosting", **{"distill.rounds": 2}), lines=log)
    answers, wanted = made.ensemble.answers(made.pool.images).double(), torch.tensor([0.25, 0.75]).double()
    lines = [line for line in log if line["stage"] == "weights"]
    assert [line["round"] for line in lines] == [0, 1]
    for r, line in enumerate(lines):
        seen = slice(0, 10 * (r + 1))
        towards = slope(answers[:, seen], made.pool.targets[seen], wanted, "logits")
        wanted = moved(wanted, towards, 0.1 * 0.5**r)
        torch.testing.assert_close(line["weights"], (wanted / wanted.sum()).float())
    torch.testing.assert_close(made.ensemble.weights, lines[-1]["weights"][:, None].expand(2, 10))
    assert (wanted - torch.tensor([0.25, 0.75])).abs().min() > 0.02


def test_without_a_step_the_weights_are_those_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coboosting, "STEP", 0.0)
    for start, wanted in (("estimated", [0.25, 0.75]), ("uniform", [0.5, 0.5])):
        made = fused(settings(method="coboosting", **{"ensemble.weights": start}))
        assert made.ensemble.weights[:, 0].tolist() == pytest.approx(wanted)

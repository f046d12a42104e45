"""F-ADI, DENSE and Co-Boosting: their losses by hand, their limits, and what they have in common with FedMITR."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import a_vit, an_ensemble, an_upload, fused, same, settings, some_images
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import value_range
from fedmitr_flwr.distillation import distil, losses
from fedmitr_flwr.distillation.losses import soft_divergence
from fedmitr_flwr.inversion import generator
from fedmitr_flwr.inversion.generator import Generator, generate
from fedmitr_flwr.inversion.invert import PIXELS
from fedmitr_flwr.methods import adi, coboosting
from fedmitr_flwr.methods.coboosting import diversify, hard_loss
from fedmitr_flwr.methods.contract import Fused
from fedmitr_flwr.methods.dense import boundary_loss
from fedmitr_flwr.vit.names import normalisation
from fedmitr_flwr.vit.tokens import all_positions, patchify

RIVALS = ("adi", "dense", "coboosting")
# Two images of two classes. Ensemble: p = (3/4, 1/4) on both; student: (1/4, 3/4), which differs, and (1/2 + , 1/2 -).
SCORES = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
STUDENT = torch.tensor([[1.0, 3.0], [2.0, 1.0]]).log()
TARGETS = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def _small_generators(monkeypatch: pytest.MonkeyPatch) -> None:
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
    plain = hard_loss(SCORES, SCORES, TARGETS)
    assert plain.tolist() == pytest.approx([math.log(4 / 3) / 4, 3 * math.log(4) / 4])
    wanted, given = (SCORES / 3).softmax(1), (STUDENT / 3).softmax(1)
    apart = 9 * (wanted * (wanted / given).log()).sum(1)
    assert (apart > 0.01).all()
    torch.testing.assert_close(hard_loss(SCORES, STUDENT, TARGETS), plain - apart)


def test_the_hardness_weighs_and_is_no_part_of_the_slope() -> None:
    """Where the student agrees, the divergence has no slope."""
    scores = SCORES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(hard_loss(scores, SCORES, TARGETS).sum(), scores)
    # dCE/dz = p - one-hot, times 1 - p_y
    wanted = torch.tensor([[-1 / 4, 1 / 4], [3 / 4, -3 / 4]]) * torch.tensor([[1 / 4], [3 / 4]])
    torch.testing.assert_close(slope, wanted)


def test_hard_images_of_probability_0_weigh_1() -> None:
    impossible = torch.tensor([[-60.0, 60.0], [60.0, -60.0]])
    assert torch.equal(hard_loss(impossible, impossible, TARGETS), cross_entropies(impossible, impossible, TARGETS))


@pytest.mark.parametrize(
    ("size", "chans", "patch", "coarse"),
    [(32, 3, 4, 8), (224, 3, 16, 7), (28, 1, 4, 7), (30, 3, 5, 8), (96, 3, 16, 6), (8, 1, 2, 2), (3, 1, 3, 1)],
)
def test_generated_images_have_the_shape_and_range_of_pictures(size: int, chans: int, patch: int, coarse: int) -> None:
    """32 pixels come from 8."""
    config = settings(**{"model.img-size": size, "model.in-chans": chans, "model.patch-size": patch})
    assert Generator(config.model).coarse == coarse
    torch.manual_seed(0)
    images = Generator(config.model)(100 * torch.randn(2, 8))
    assert images.shape == (2, chans, size, size)
    low, high = value_range(config.model)
    assert (images >= low[:, None, None]).all()
    assert (images <= high[:, None, None]).all()
    mean, std = normalisation(config.model)
    torch.testing.assert_close(low * std + mean, torch.zeros(chans))
    torch.testing.assert_close(high * std + mean, torch.ones(chans))


@pytest.fixture
def _large_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 25, "LR": 0.01, "WIDTH": 64}.items():
        monkeypatch.setattr(generator, name, value)


@pytest.mark.usefixtures("_large_generators")
def test_a_generator_lowers_its_loss_and_gives_back_the_best_images() -> None:
    config, losses = settings(), list[float]()
    ensemble, student, targets = an_ensemble(config), a_vit(config, 9), torch.arange(20) % 10
    asked = ensemble, student, config, cross_entropies, targets
    made = generate(*asked, stream(0), lambda loss, _: losses.append(loss))
    assert len(losses) == 25
    assert min(losses) < 0.7 * losses[0]
    assert made.loss.mean().item() == min(losses)
    with torch.no_grad():  # the images that are given back have the loss that is told
        scores = ensemble(made.images)
    torch.testing.assert_close(made.loss, F.cross_entropy(scores, targets, reduction="none"), rtol=1e-4, atol=1e-4)
    assert made.alive.all()
    assert made.images.std(0).mean() > 0.01  # not one image for all


@pytest.mark.usefixtures("_large_generators")
def test_the_student_has_a_say_in_the_images() -> None:
    """With the adversarial term they lie further from it than without."""
    config = settings()
    ensemble, student, targets = an_ensemble(config), a_vit(config, 9), torch.arange(20) % 10

    def apart(weight: float) -> float:
        def loss(scores: Tensor, student: Tensor, targets: Tensor) -> Tensor:
            return cross_entropies(scores, student, targets) - weight * soft_divergence(scores, student, 3.0)

        images = generate(ensemble, student, config, loss, targets, stream(0)).images
        with torch.no_grad():
            return soft_divergence(ensemble(images), student(images), 3.0).mean().item()

    assert apart(3.0) > 1.5 * apart(0.0)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_generated_batch_too_large_for_the_memory_is_made_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "STEPS", 1)
    config = settings()
    ensemble, student = an_ensemble(config), a_vit(config, 9)
    seen: list[int] = []

    def hungry(scores: Tensor, student: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        if len(targets) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return boundary_loss(scores, student, targets)

    made = generate(ensemble, student, config, hungry, torch.arange(7), stream(0))
    assert seen == [7, 3, 4]
    assert made.targets.tolist() == list(range(7))


@pytest.mark.parametrize("chans", [1, 3])
def test_diversified_images_move_by_so_many_grey_levels(chans: int) -> None:
    config = settings(**{"model.in-chans": chans})
    ensemble = an_ensemble(config)
    low, high = (limit.repeat_interleave(4) for limit in value_range(config.model))
    patches = patchify(some_images(config, 6), 2).clamp(low, high)
    moved = diversify(ensemble, patches, all_positions(patches), stream(0), config.model)
    greys = (moved - patches) * normalisation(config.model)[1].repeat_interleave(4) * 255
    inside = (moved > low) & (moved < high)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(greys[inside].abs(), torch.full_like(greys[inside], 8.0), rtol=0, atol=1e-3)
    assert (greys[~inside].abs() <= 8.001).all()
    assert ((moved >= low) & (moved <= high)).all()
    again = diversify(ensemble, patches, all_positions(patches), stream(1), config.model)
    assert not torch.equal(moved, again)


def test_diversified_images_turn_the_answer_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """uᵀ softmax(A/T) rises for almost every image: the sign of the slope is a direction of ascent."""
    monkeypatch.setattr(coboosting, "PERTURB", 2.0)
    config = settings()
    ensemble, images = an_ensemble(config), 0.5 * some_images(config, 12)
    patches = patchify(images, 2)
    moved = diversify(ensemble, patches, all_positions(patches), stream(3), config.model)
    directions = 2 * torch.rand(12, 10, generator=stream(3)) - 1

    def turned(patches: Tensor) -> Tensor:
        with torch.no_grad():
            scores = ensemble.scores(patches, all_positions(patches)).cls
        return (directions * (scores / 4).softmax(-1)).sum(-1)

    assert (turned(moved) > turned(patches)).float().mean() > 0.9


def made_by(method: str, log: list[dict[str, Any]] | None = None, **changes: object) -> Fused:
    return fused(settings(**{"method": method, "distill.rounds": 2} | changes), lines=log)


def alike(first: Fused, second: Fused) -> bool:
    return same(first.weights, second.weights) and torch.equal(first.pool.images, second.pool.images)


def test_adi_has_fedmitr_s_dense_images_at_its_own_rate_and_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[dict[str, Any]] = []
    published = made_by("adi", log)
    monkeypatch.setattr(adi, "PIXELS", PIXELS)
    made, fedmitr = made_by("adi"), made_by("fedmitr", **{"inversion.mode": "dense"})
    assert torch.equal(made.pool.images, fedmitr.pool.images)
    assert not torch.equal(published.pool.images, made.pool.images)
    assert not alike(made, fedmitr)  # whose student has other lessons
    assert all(line["low"] == line["high"] == 0 for line in log if line["stage"] == "distillation")


@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_are_repeatable_whatever_is_fedmitr_s_own(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"relabel.mode": "drop", "inversion.mode": "pri4", "inversion.stops": "0.5", "distill.init": "classwise"}
    torch.manual_seed(1)
    bare = made_by(rival)
    torch.manual_seed(2)
    for name, value in {"HIGH": 3.0, "TOKEN": 2.0, "TEMPERATURE": 9.0, "LOW_TEMPERATURE": 9.0}.items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(distil, "KEEP", 0.4)
    assert alike(bare, made_by(rival, **theirs))
    assert not alike(bare, made_by(rival, **theirs, seed=1))


def test_coboosting_without_its_three_ideas_is_dense_without_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made_by("coboosting")
    monkeypatch.setattr(coboosting, "STEP", 0.0)
    monkeypatch.setattr(coboosting, "diversify", lambda _ensemble, patches, *_, **__: patches)
    monkeypatch.setattr(coboosting, "hard_loss", boundary_loss)
    uniform = {"ensemble.weights": "uniform"}
    assert alike(made_by("coboosting", **uniform), made_by("dense", **uniform))
    assert not alike(whole, made_by("dense"))


@pytest.mark.parametrize("name", ["PERTURB", "STEP"])
def test_each_idea_changes_coboosting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made_by("coboosting")
    monkeypatch.setattr(coboosting, name, 0.0)
    assert not alike(whole, made_by("coboosting"))


@pytest.mark.parametrize("rival", RIVALS)
def test_colour_and_routes_and_a_chosen_start(rival: str) -> None:
    changes = {"model.in-chans": 3, "model.img-size": 28, "model.patch-size": 4, "data.flip": True}
    changes |= {"ensemble.weights": "estimated", "ensemble.combine": "probs", "distill.extrapolate": 0.0}
    changes |= {"inversion.route": 0.5} if rival != "coboosting" else {}
    made = made_by(rival, **changes)
    assert all(tensor.isfinite().all() for tensor in made.weights.values())
    assert made.pool.images.shape == (20, 3, 28, 28)


def test_one_weight_for_all_classes_routes_nothing() -> None:
    config = settings(method="coboosting", **{"ensemble.weights": "estimated", "inversion.route": 0.5})
    with pytest.raises(ConfigError, match=r"learns one for each teacher; set inversion.route = 0"):
        methods.check(config)


@pytest.mark.parametrize("rival", RIVALS)
def test_the_pool_grows_and_the_metrics_tell(rival: str) -> None:
    log: list[dict[str, Any]] = []
    made = made_by(rival, log, **{"inversion.batch-size": 6})
    assert len(made.pool) == 20
    stage = "inversion" if rival == "adi" else "generation"
    batches = [(line["round"], line["batch"]) for line in log if line["stage"] == stage]
    assert batches == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len([line for line in log if line["stage"] == "weights"]) == (2 if rival == "coboosting" else 0)
    kd = [line["kd"] for line in log if line["stage"] == "distillation"]
    assert all(value > 0 for value in kd)
    assert len(kd) == 2
    json.dumps([{key: value for key, value in line.items() if key != "weights"} for line in log], allow_nan=False)


@pytest.mark.parametrize("rival", ["dense", "coboosting"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    rival: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("save_images", "save_partition"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    small = {"distill.rounds": 3, "ensemble.weights": "size"}
    config = settings(method="fedavg", **small, **{"out-dir": str(tmp_path)})
    run = pipeline.run(config, "run")
    whole = pipeline.fuse(run, rival, {})
    make, made = generator.generate, []

    class KilledError(Exception):
        pass

    def dies(*given: Any, **more: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise KilledError
        return make(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(generator, "generate", dies)
        with pytest.raises(KilledError):
            pipeline.fuse(run, rival, {})
        made.extend([1] * 10)
        killed = tmp_path / "run" / "fused" / f"{rival}-2"
        assert len(list((killed / "work").iterdir())) == 3  # two rounds' images, and the student
        resumed = pipeline.run(Config.from_flat({"resume-from": str(killed), "method": rival}, base=whole.config))
        assert len(made) == 14  # only the third round's images were made
    for name in ("model.safetensors", "pool.safetensors"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_an_ensemble_of_one_may_learn() -> None:
    config = settings(method="coboosting")
    made = fused(config, [an_upload(config, 0)])
    assert torch.equal(made.ensemble.weights, torch.ones(1, 10))

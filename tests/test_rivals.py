"""F-ADI, DENSE and Co-Boosting: their losses by hand, their limits, and what they have in common with FedMITR."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import a_vit, an_ensemble, an_upload, settings, some_images
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import value_range
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.generator import Generator, generate
from fedmitr_flwr.methods import coboosting, dense
from fedmitr_flwr.methods.coboosting import diversify, hard_loss
from fedmitr_flwr.methods.contract import Fused, Job
from fedmitr_flwr.methods.dense import boundary_loss
from fedmitr_flwr.vit.names import normalisation
from fedmitr_flwr.vit.tokens import all_positions, patchify

CPU = torch.device("cpu")
RIVALS = ("adi", "dense", "coboosting")
# Two images of two classes. Ensemble: p = (3/4, 1/4) on both; student: (1/4, 3/4), which differs, and (1/2 + , 1/2 -).
SCORES = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
STUDENT = torch.tensor([[1.0, 3.0], [2.0, 1.0]]).log()
TARGETS = torch.tensor([0, 1])


def test_the_boundary_loss_by_hand() -> None:
    """CE: -log 3/4 and -log 1/4. KL of the first: 3/4 log 3 + 1/4 log 1/3 = log(3) / 2. The second agrees: no term."""
    found = boundary_loss(SCORES, STUDENT, TARGETS, weight=0.5)
    assert found.tolist() == pytest.approx([math.log(4 / 3) - 0.25 * math.log(3), math.log(4)], abs=1e-6)


def test_where_all_agree_the_boundary_loss_is_cross_entropy() -> None:
    found = boundary_loss(SCORES, 5 * SCORES, TARGETS, weight=9.0)
    assert torch.equal(found, F.cross_entropy(SCORES, TARGETS, reduction="none"))


def test_the_hard_loss_by_hand() -> None:
    """(1/4)·log(4/3) and (3/4)·log 4, less the divergence at temperature 3 on both images."""
    plain = hard_loss(SCORES, STUDENT, TARGETS, weight=0.0, hard=1.0)
    assert plain.tolist() == pytest.approx([math.log(4 / 3) / 4, 3 * math.log(4) / 4])
    wanted, given = (SCORES / 3).softmax(1), (STUDENT / 3).softmax(1)
    apart = 9 * (wanted * (wanted / given).log()).sum(1)
    assert (apart > 0.01).all()
    torch.testing.assert_close(hard_loss(SCORES, STUDENT, TARGETS, 2.0, 1.0), plain - 2 * apart)


def test_the_hardness_weighs_and_is_no_part_of_the_slope() -> None:
    scores = SCORES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(hard_loss(scores, STUDENT, TARGETS, 0.0, 2.0).sum(), scores)
    # dCE/dz = p - one-hot, times (1 - p_y)²
    wanted = torch.tensor([[-1 / 4, 1 / 4], [3 / 4, -3 / 4]]) * torch.tensor([[1 / 16], [9 / 16]])
    torch.testing.assert_close(slope, wanted)


def test_hard_images_of_probability_0_or_exponent_0_weigh_1() -> None:
    impossible = torch.tensor([[-60.0, 60.0], [60.0, -60.0]])
    entropy = F.cross_entropy(impossible, TARGETS, reduction="none")
    assert torch.equal(hard_loss(impossible, impossible, TARGETS, 0.0, 1.0), entropy)
    assert torch.equal(hard_loss(SCORES, SCORES, TARGETS, 0.0, 0.0), F.cross_entropy(SCORES, TARGETS, reduction="none"))


SHAPES = [(8, 1, 2), (28, 1, 4), (30, 3, 5), (96, 3, 16), (224, 3, 16), (3, 1, 3), (1, 1, 1)]


@pytest.mark.parametrize(("size", "chans", "patch"), SHAPES)
def test_generated_images_have_the_shape_and_range_of_pictures(size: int, chans: int, patch: int) -> None:
    config = settings(**{"model.img-size": size, "model.in-chans": chans, "model.patch-size": patch})
    torch.manual_seed(0)
    images = Generator(config.model, latent=5, width=4)(100 * torch.randn(2, 5))
    assert images.shape == (2, chans, size, size)
    low, high = value_range(config.model)
    assert (images >= low[:, None, None]).all()
    assert (images <= high[:, None, None]).all()
    mean, std = normalisation(config.model)
    torch.testing.assert_close(low * std + mean, torch.zeros(chans))
    torch.testing.assert_close(high * std + mean, torch.ones(chans))


def test_32_pixels_come_from_8_and_few_channels_do_it() -> None:
    config = settings(**{"model.img-size": 32, "model.patch-size": 4})
    assert Generator(config.model, 256, 64).coarse == 8
    assert Generator(settings(**{"model.img-size": 224, "model.patch-size": 16}).model, 256, 64).coarse == 7


def test_a_generator_lowers_its_loss_and_gives_back_the_best_images() -> None:
    config = settings(**{"rival.steps": 25, "rival.lr": 0.01, "ensemble.combine": "probs"})
    ensemble, student, targets = an_ensemble(config), a_vit(config, 9), torch.arange(20) % 10
    losses: list[float] = []
    entropy = partial(boundary_loss, weight=0.0)
    made = generate(
        ensemble, student, targets, config, entropy, rng=stream(0), on_step=lambda loss, _: losses.append(loss)
    )
    assert len(losses) == 25
    assert min(losses) < 0.7 * losses[0]
    assert made.loss.mean().item() == min(losses)
    with torch.no_grad():  # the images that are given back have the loss that is told
        scores = ensemble(made.images)
    torch.testing.assert_close(made.loss, F.cross_entropy(scores, targets, reduction="none"), rtol=1e-4, atol=1e-4)
    assert made.alive.all()
    assert made.images.std(0).mean() > 0.01  # not one image for all


def test_the_student_has_a_say_in_the_images() -> None:
    """With the adversarial term they lie further from it than without."""
    config = settings(**{"rival.steps": 20, "rival.lr": 0.01})
    ensemble, student, targets = an_ensemble(config), a_vit(config, 9), torch.arange(20) % 10

    def apart(weight: float) -> float:
        loss = partial(hard_loss, weight=weight, hard=0.0)
        images = generate(ensemble, student, targets, config, loss, rng=stream(0)).images
        with torch.no_grad():
            return -hard_loss(ensemble(images), student(images), targets, 1.0, 200.0).mean().item()

    assert apart(3.0) > 1.5 * apart(0.0)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_generated_batch_too_large_for_the_memory_is_made_in_halves() -> None:
    config = settings(**{"rival.steps": 1})
    ensemble, student = an_ensemble(config), a_vit(config, 9)
    seen: list[int] = []

    def hungry(scores: Tensor, student: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        if len(targets) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return boundary_loss(scores, student, targets, 0.0)

    made = generate(ensemble, student, torch.arange(7), config, hungry, rng=stream(0))
    assert seen == [7, 3, 4]
    assert made.targets.tolist() == list(range(7))


@pytest.mark.parametrize("chans", [1, 3])
def test_diversified_images_move_by_so_many_grey_levels(chans: int) -> None:
    config = settings(**{"model.in-chans": chans, "rival.perturb": 8.0})
    ensemble = an_ensemble(config)
    low, high = (limit.repeat_interleave(4) for limit in value_range(config.model))
    patches = patchify(some_images(config, 6), 2).clamp(low, high)
    moved = diversify(ensemble, patches, all_positions(patches), stream(0), config)
    greys = (moved - patches) * normalisation(config.model)[1].repeat_interleave(4) * 255
    inside = (moved > low) & (moved < high)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(greys[inside].abs(), torch.full_like(greys[inside], 8.0), rtol=0, atol=1e-3)
    assert (greys[~inside].abs() <= 8.001).all()
    assert ((moved >= low) & (moved <= high)).all()
    again = diversify(ensemble, patches, all_positions(patches), stream(1), config)
    assert not torch.equal(moved, again)


def test_diversified_images_turn_the_answer_where_they_should() -> None:
    """uᵀ softmax(A/T) rises for almost every image: the sign of the slope is a direction of ascent."""
    config = settings(**{"rival.perturb": 2.0, "ensemble.combine": "probs"})
    ensemble, images = an_ensemble(config), 0.5 * some_images(config, 12)
    patches = patchify(images, 2)
    moved = diversify(ensemble, patches, all_positions(patches), stream(3), config)
    directions = 2 * torch.rand(12, 10, generator=stream(3)) - 1

    def turned(patches: Tensor) -> Tensor:
        with torch.no_grad():
            scores = ensemble.scores(patches, all_positions(patches)).cls
        return (directions * (scores / 4).softmax(-1)).sum(-1)

    assert (turned(moved) > turned(patches)).float().mean() > 0.9


def fused(method: str, log: list[dict[str, Any]] | None = None, **changes: object) -> Fused:
    given = {"method": method, "distill.epochs": 2, "rival.steps": 4, "rival.width": 4, "rival.latent": 8}
    config = settings(**given | changes)
    uploads = [an_upload(config, client, 10 + 20 * client) for client in range(2)]
    lines: list[dict[str, Any]] = [] if log is None else log
    return methods.fuse(Job(uploads, config, CPU, lambda **values: lines.append(values)))


def same(first: Fused, second: Fused) -> bool:
    assert first.weights is not None
    assert second.weights is not None
    assert first.pool is not None
    assert second.pool is not None
    equal = all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())
    return equal and torch.equal(first.pool.images, second.pool.images)


def test_adi_has_fedmitr_s_dense_images() -> None:
    log: list[dict[str, Any]] = []
    adi = fused("adi", log, **{"distill.high": 0.7, "relabel.mode": "tokens"})
    published = {"inversion.mode": "dense", "inversion.start": "noise", "inversion.lr": 0.25}
    fedmitr = fused("fedmitr", **published)
    assert adi.pool is not None
    assert fedmitr.pool is not None
    assert torch.equal(adi.pool.images, fedmitr.pool.images)
    assert not same(adi, fedmitr)
    by_hand = {"relabel.mode": "none", "distill.high": 0.0, "distill.low": 0.0, "distill.temperature": 4.0}
    assert same(adi, fused("fedmitr", **by_hand, **published))
    assert all(line["low"] == 0 for line in log if line["stage"] == "distillation")


@pytest.mark.parametrize("rival", RIVALS)
def test_what_is_fedmitr_s_own_does_not_touch_the_rivals(rival: str) -> None:
    theirs = {"relabel.mode": "drop", "distill.high": 3.0, "distill.mix": "tokens", "distill.keep": 0.4}
    theirs |= {"distill.temperature": 9.0, "inversion.mode": "pri", "inversion.stops": "0.5", "distill.token": 2.0}
    theirs |= {"inversion.start": "leaves", "inversion.lr": 0.1}
    changed = {**theirs, "inversion.mode": "sparse"}
    assert same(fused(rival), fused(rival, **changed))


def test_coboosting_without_its_three_ideas_is_dense_without_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {"rival.perturb": 0.0, "rival.hard": 0.0, "ensemble.learn-step": 0.0, "ensemble.weights": "uniform"}
    cut = fused("coboosting", **bare)

    def unmasked(scores: Tensor, student: Tensor, targets: Tensor, weight: float) -> Tensor:
        return hard_loss(scores, student, targets, weight, 0.0)

    masked = fused("dense", **bare)
    monkeypatch.setattr(dense, "boundary_loss", unmasked)
    assert same(cut, fused("dense", **bare))
    assert not same(cut, masked)


@pytest.mark.parametrize(
    "change", [{"rival.perturb": 8.0}, {"rival.hard": 1.0}, {"ensemble.learn-step": 0.05}, {"rival.adversarial": 2.0}]
)
def test_each_idea_changes_coboosting(change: dict[str, object]) -> None:
    bare: dict[str, object] = {"rival.perturb": 0.0, "rival.hard": 0.0, "ensemble.learn-step": 0.0}
    assert not same(fused("coboosting", **bare), fused("coboosting", **bare | change))


@pytest.mark.parametrize("rival", RIVALS)
def test_same_seed_same_bits(rival: str) -> None:
    torch.manual_seed(1)
    first = fused(rival)
    torch.manual_seed(2)
    assert same(first, fused(rival))
    assert not same(first, fused(rival, seed=1))


@pytest.mark.parametrize("rival", RIVALS)
def test_teachers_that_are_streamed_or_stacked_give_the_same(rival: str) -> None:
    one_step = {"distill.epochs": 1, "rival.steps": 2, "inversion.steps": 2, "inversion.stops": ""}
    plain = fused(rival, **one_step)
    assert plain.pool is not None
    for how in ({"ensemble.teacher-chunk": 1}, {"ensemble.stack": "always"}):
        other = fused(rival, **one_step, **how)
        assert other.pool is not None
        torch.testing.assert_close(other.pool.images, plain.pool.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("size", "patch", "chans"), [(28, 4, 1), (96, 16, 3)])
def test_images_of_other_sizes(rival: str, size: int, patch: int, chans: int) -> None:
    shape = {"model.img-size": size, "model.patch-size": patch, "model.in-chans": chans}
    made = fused(rival, **shape, **{"distill.images-per-epoch": 4, "inversion.steps": 2, "inversion.stops": ""})
    assert made.pool is not None
    assert made.pool.images.shape == (8, chans, size, size)
    assert made.pool.images.isfinite().all()


@pytest.mark.parametrize("rival", RIVALS)
def test_colour_and_routes_and_a_chosen_start(rival: str) -> None:
    changes = {"model.in-chans": 3, "data.flip": True, "distill.extrapolate": 0.0, "distill.ema": 0.5}
    changes |= {"ensemble.weights": "estimated", "ensemble.combine": "probs"}
    if rival != "coboosting":
        changes |= {"inversion.route": 0.5}
    made = fused(rival, **changes)
    assert made.weights is not None
    assert all(tensor.isfinite().all() for tensor in made.weights.values())


def test_one_weight_for_all_classes_routes_nothing() -> None:
    config = settings(method="coboosting", **{"ensemble.weights": "estimated", "inversion.route": 0.5})
    with pytest.raises(ConfigError, match=r"learns one for each teacher; set inversion.route = 0"):
        methods.check(config)


@pytest.mark.parametrize("rival", RIVALS)
def test_the_pool_grows_and_the_metrics_tell(rival: str) -> None:
    log: list[dict[str, Any]] = []
    made = fused(rival, log, **{"inversion.batch-size": 6})
    assert made.pool is not None
    assert len(made.pool) == 20
    stage = "inversion" if rival == "adi" else "generation"
    assert [(line["epoch"], line["batch"]) for line in log if line["stage"] == stage] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert len([line for line in log if line["stage"] == "weights"]) == (2 if rival == "coboosting" else 0)
    kd = [line["kd"] for line in log if line["stage"] == "distillation"]
    assert all(value > 0 for value in kd)
    assert len(kd) == 2
    json.dumps([{key: value for key, value in line.items() if key != "weights"} for line in log], allow_nan=False)


@pytest.mark.parametrize("rival", RIVALS)
def test_the_student_comes_nearer_to_the_ensemble(rival: str) -> None:
    log: list[dict[str, Any]] = []
    changes = {"distill.epochs": 1, "distill.passes": 25, "distill.images-per-epoch": 20, "distill.init": "initial"}
    made = fused(rival, log, **changes, **{"distill.lr": 3e-3})
    assert made.ensemble is not None
    config = settings(**changes)
    images = made.pool.images if made.pool is not None else some_images(config, 20)
    student = a_vit(config, 0, noise=0.0)
    with torch.no_grad():
        wanted = made.ensemble(images).softmax(1)
        before = (wanted * (wanted.log() - student(images).log_softmax(1))).sum(1).mean()
        after = (wanted * (wanted.log() - made.predict(images).log_softmax(1))).sum(1).mean()
    assert after < 0.5 * before


@pytest.mark.parametrize("rival", ["dense", "coboosting"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    rival: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("save_images", "save_partition"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    small = {"rival.steps": 3, "rival.width": 4, "distill.epochs": 3, "ensemble.weights": "learned"}
    config = settings(method="fedavg", **small, **{"out-dir": str(tmp_path)})
    run = pipeline.run(config, "run")
    whole = pipeline.fuse(run, rival, {})
    module = {"dense": dense, "coboosting": coboosting}[rival]
    make, made = module.make, []

    class KilledError(Exception):
        pass

    def dies(*given: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise KilledError
        return make(*given)

    with monkeypatch.context() as patched:
        patched.setattr(module, "make", dies)
        with pytest.raises(KilledError):
            pipeline.fuse(run, rival, {})
        made.extend([1] * 10)
        killed = tmp_path / "run" / "fused" / f"{rival}-2"
        assert len(list((killed / "work").iterdir())) == 3  # two epochs' images, and the student
        resumed = pipeline.run(Config.from_flat({"resume-from": str(killed), "method": rival}, base=whole.config))
        assert len(made) == 14  # only the third epoch's images were made
    for name in ("model.safetensors", "pool.safetensors"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_an_ensemble_of_one_may_learn() -> None:
    config = settings(method="coboosting", **{"rival.steps": 2, "rival.width": 4})
    upload = an_upload(config, 0)
    made = methods.fuse(Job([upload], config, CPU, lambda **_: None))
    assert isinstance(made.ensemble, Ensemble)
    assert torch.equal(made.ensemble.weights, torch.ones(1, 10))

"""Methods: one file each, found by name, and what each of them gives back."""

import copy
import json
import math
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from tiny import Sgd, a_vit, an_upload, fused, same, settings, some_images

from fedmitr_flwr import methods
from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation import distil, losses
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.scout import Weigher
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.methods import fedmitr, rounds
from fedmitr_flwr.methods.contract import Stopwatch
from fedmitr_flwr.methods.rounds import balanced_targets
from fedmitr_flwr.vit.optim import Stepper

KNOWN = ["adi", "coboosting", "dense", "ensemble", "fedavg", "feddf", "fedmedian"]
KNOWN += ["fedmitr", "fedpft", "krum", "layerwise", "lda", "regmean", "ridge"]
KNOWN += ["task_arithmetic", "ties", "tsv", "wudi"]


def test_every_file_is_a_method() -> None:
    assert methods.available() == KNOWN
    assert all(callable(methods.load(name).fuse) and methods.load(name).__doc__ for name in KNOWN)


@pytest.mark.parametrize("name", ["fedmitra", "contract", "", "fedavg.fuse", "../fedavg"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        methods.load(name)
    assert str(refused.value).startswith(f"method = {name!r} is not one of: {', '.join(KNOWN)}")


@torch.no_grad()
def test_fedavg_is_the_average() -> None:
    config = settings(method="fedavg")
    made = fused(config)
    assert same(made.weights, average([an_upload(config, client, 10 + 20 * client) for client in range(2)]))
    mean = a_vit(config, 5)
    mean.load_state_dict(made.weights)
    images = some_images(config, 3)
    assert torch.equal(made.predict(images), mean(images))
    assert made.pool is None


@torch.no_grad()
def test_ensemble_keeps_every_model() -> None:
    config = settings(method="ensemble", **{"ensemble.combine": "probs"})
    made = fused(config)
    images = some_images(config, 3)
    first, second = (a_vit(config, client)(images).div(3).softmax(1) for client in range(2))
    torch.testing.assert_close(made.predict(images).softmax(1), 0.25 * first + 0.75 * second)
    assert made.weights is None
    assert made.pool is None


MODES = [(inversion, relabel) for inversion in ("dense", "sparse", "pri4") for relabel in ("none", "drop", "tokens")]


@pytest.mark.parametrize(("inversion", "relabel"), MODES)
def test_fedmitr_gives_a_student_and_its_pool(inversion: str, relabel: str) -> None:
    changes = {"inversion.mode": inversion, "relabel.mode": relabel, "distill.rounds": 2}
    config = settings(**changes, **{"inversion.batch-size": 6, "distill.images-per-round": 12})
    metrics, stopwatch = list[dict[str, Any]](), Stopwatch()
    made = fused(config, lines=metrics, stopwatch=stopwatch)
    with torch.no_grad():
        images = some_images(config, 3)
        student = a_vit(config, 5)
        student.load_state_dict(made.weights)
        assert torch.equal(made.predict(images), student(images))
        start = a_vit(config, 5)
        start.load_state_dict(average([an_upload(config, client, 10 + 20 * client) for client in range(2)]))
        assert not torch.equal(student(images), start(images))
    assert all(torch.isfinite(tensor).all() for tensor in made.weights.values())
    assert len(made.pool) == (12 if (inversion, relabel) == ("pri4", "drop") else 24)
    assert torch.isfinite(made.pool.images).all()
    if inversion != "pri4":  # whose images share their canvases
        assert len(made.pool.images.flatten(1).unique(dim=0)) == 24  # every round and batch has noise of its own
    # By pri4, three targets make twelve images: one batch. Otherwise two of six.
    inversions = [line for line in metrics if line["stage"] == "inversion"]
    assert [(line["round"], line["batch"]) for line in inversions] == (
        [(0, 0), (1, 0)] if inversion == "pri4" else [(0, 0), (0, 1), (1, 0), (1, 1)]
    )
    assert [line["round"] for line in metrics if line["stage"] == "distillation"] == [0, 1]
    assert all(math.isfinite(line["loss"]) for line in inversions)
    assert set(metrics[-1]) == {"stage", "round", "high", "low", "kd", "curve"}
    json.dumps(metrics, allow_nan=False)
    assert set(stopwatch.seconds) == {"inversion", "distillation"}
    assert all(seconds > 0 for seconds in stopwatch.seconds.values())


MANY = {"distill.images-per-round": 9, "inversion.batch-size": 3, "distill.rounds": 2}


@pytest.mark.parametrize("method", ["fedmitr", "dense"])
def test_batches_that_are_made_side_by_side_are_those_made_in_turn(method: str) -> None:
    config = settings(method=method, **MANY)
    told: list[dict[str, Any]] = []
    in_turn = fused(config)
    with threads(2):
        beside = fused(config, lines=told)
    assert torch.equal(in_turn.pool.images, beside.pool.images)
    assert same(in_turn.weights, beside.weights)
    stage = "inversion" if method == "fedmitr" else "generation"
    batches = [(each["round"], each["batch"]) for each in told if each["stage"] == stage]
    assert sorted(batches) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("mode", "canvases"), [("sparse", 9), ("pri4", 3)])
def test_teachers_are_weighed_by_each_canvas_once(mode: str, canvases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pri4` takes four images from one canvas, which as wholes are one image: four times the evidence is none."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    refine = Weigher.refine

    def spy(weigher: Weigher, images: torch.Tensor, targets: torch.Tensor) -> None:
        seen.append((images, targets))
        refine(weigher, images, targets)

    monkeypatch.setattr(Weigher, "refine", spy)
    made = fused(settings(**MANY | {"inversion.mode": mode, "inversion.batch-size": 2}))
    assert made.pool is not None
    for epoch, (images, targets) in enumerate(seen, 1):
        assert len(images) == len(images.flatten(1).unique(dim=0)) == len(targets) == epoch * canvases
    known = {(image.numpy().tobytes(), int(y)) for image, y in zip(made.pool.images, made.pool.targets, strict=True)}
    last = zip(*seen[-1], strict=True)
    assert {(image.numpy().tobytes(), int(target)) for image, target in last} == known


def test_when_one_batch_fails_the_others_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have a million steps to go, which would take hours."""
    invert, begun = fedmitr.invert, Event()

    def fails_second(ensemble: Ensemble, targets: torch.Tensor, *rest: Any, rng: torch.Generator, **more: Any) -> Any:
        if rng.initial_seed() == stream(0, "inversion", 0, 1).initial_seed():
            assert begun.wait(10)
            raise ValueError("the second")
        begun.set()
        return invert(ensemble, targets, *rest, rng=rng, **more)

    monkeypatch.setattr(fedmitr, "invert", fails_second)
    with threads(2), pytest.raises(ValueError, match="the second"):
        fused(settings(method="fedmitr", **MANY | {"inversion.steps": 1_000_000, "seed": 0}))


@pytest.mark.parametrize(("inversion", "relabel", "images"), [("sparse", "tokens", 13), ("pri4", "drop", 8)])
def test_the_learning_rate_ends_at_zero_with_the_last_batch(
    inversion: str, relabel: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over growing pools of so many images more each round: the steps are counted ahead exactly."""
    rates: list[float] = []
    step = Stepper.step

    def spy(stepper: Stepper, loss: torch.Tensor) -> None:
        step(stepper, loss)
        rates.append(stepper.schedules[0].get_last_lr()[0])

    monkeypatch.setattr(Stepper, "step", spy)
    changes = {"inversion.mode": inversion, "relabel.mode": relabel, "distill.rounds": 3}
    monkeypatch.setattr(distil, "BATCH", 8)
    fused(settings(**changes, **{"distill.epochs-per-round": 2, "distill.images-per-round": 13}))
    assert len(rates) == 2 * sum(-(-r * images // 8) for r in (1, 2, 3))
    assert rates[-1] == 0
    assert all(rate > 0 for rate in rates[:-1])


@pytest.mark.parametrize("inversion", ["dense", "sparse", "pri4"])
def test_fedmitr_is_repeatable(inversion: str) -> None:
    config = settings(**{"data.flip": True, "inversion.mode": inversion})
    torch.manual_seed(1)
    first = fused(config)
    torch.manual_seed(2)
    again, other = fused(config), fused(replace(config, seed=1))
    assert same(first.weights, again.weights)
    assert same(first.pool.tensors(), again.pool.tensors())
    assert not torch.equal(first.pool.images, other.pool.images)


def test_the_uploads_are_left_alone() -> None:
    uploads = [an_upload(settings(), client) for client in range(2)]
    before = copy.deepcopy([upload.weights for upload in uploads])
    fused(settings(), uploads)
    assert all(same(upload.weights, weights) for upload, weights in zip(uploads, before, strict=True))


@torch.no_grad()
def test_one_upload_is_inverted_and_distilled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1: the ensemble is the client's model, the average too, and with soft labels only the student stays it."""
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(rounds, "student_stepper", lambda vit, _, steps: Sgd(vit, 0.1, steps))
    config = settings()
    upload = an_upload(config, 0)
    with torch.enable_grad():
        made = fused(config, [upload])
    for name, tensor in upload.weights.items():
        torch.testing.assert_close(made.weights[name], tensor, rtol=0, atol=1e-4)
    images = some_images(config, 3)
    alone = Ensemble.of([upload], config.model, config.ensemble)
    torch.testing.assert_close(made.predict(images), alone(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("images", "classes"), [(20, 10), (23, 10), (7, 10), (1, 2)])
def test_targets_are_balanced(images: int, classes: int) -> None:
    config = settings(**{"distill.images-per-round": images, "model.num-classes": classes})
    drawn = [balanced_targets(config, stream(seed)) for seed in range(40)]
    for targets in drawn:
        counts = torch.bincount(targets, minlength=classes)
        assert counts.sum() == images
        assert counts.max() - counts.min() <= 1
    assert torch.cat(drawn).unique().tolist() == list(range(classes))  # the remainder falls on every class
    assert images == 1 or any(targets.tolist() != sorted(targets.tolist()) for targets in drawn)


def test_the_stopwatch_adds_up_and_stops_on_errors() -> None:
    watch = Stopwatch()
    with watch.stage("a"):
        pass
    once = watch.seconds["a"]
    with watch.stage("a"):
        sum(range(1000))
    with pytest.raises(ZeroDivisionError), watch.stage("b"):
        1 / 0  # noqa: B018
    assert watch.seconds["a"] > once
    assert watch.seconds["b"] > 0

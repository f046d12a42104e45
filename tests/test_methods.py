"""Methods: one file each, found by name, and what each of them gives back."""

import json
from threading import Event
from typing import Any

import pytest
import torch
from tiny import Sgd, a_vit, fused, same, settings, some_images, two_uploads
from torch.nn import functional as F

from fedmitr_flwr import methods
from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation import distil, losses
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion import generator
from fedmitr_flwr.inversion.scout import Weigher
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.methods import fedmitr, rounds
from fedmitr_flwr.methods.contract import Stopwatch
from fedmitr_flwr.methods.rounds import balanced_targets
from fedmitr_flwr.vit.build import vit_of
from fedmitr_flwr.vit.optim import Stepper

KNOWN = ["adi", "coboosting", "dense", "ensemble", "fedavg", "feddf", "fedmedian"]
KNOWN += ["fedmitr", "fedpft", "krum", "layerwise", "lda", "regmean", "ridge"]
KNOWN += ["task_arithmetic", "ties", "tsv", "wudi"]
MANY = {"distill.images-per-round": 9, "inversion.batch-size": 3, "distill.rounds": 2, "inversion.steps": 4}


def test_every_file_is_a_method() -> None:
    assert methods.available() == KNOWN
    assert all(callable(methods.load(name).fuse) and methods.load(name).__doc__ for name in KNOWN)
    for unknown in ("fedmitra", "contract", "", "fedavg.fuse", "../fedavg"):
        with pytest.raises(ConfigError, match=f"method = {unknown!r} is not one of: {', '.join(KNOWN)}"):
            methods.load(unknown)


@torch.no_grad()
def test_fedavg_is_the_average_and_ensemble_keeps_every_model() -> None:
    images = some_images(settings(), 3)
    made = fused(settings(method="fedavg"))
    assert same(made.weights, average(two_uploads()))
    assert torch.equal(made.predict(images), vit_of(settings().model, made.weights)(images))
    kept = fused(settings(method="ensemble", **{"ensemble.combine": "probs"}))
    first, second = (a_vit(settings(), client)(images).div(3).softmax(1) for client in range(2))
    torch.testing.assert_close(kept.predict(images).softmax(1), 0.25 * first + 0.75 * second)
    assert kept.weights is made.pool is kept.pool is None


@pytest.mark.parametrize(
    ("inversion", "relabel"), [("dense", "drop"), ("sparse", "tokens"), ("pri4", "none"), ("pri4", "drop")]
)
@torch.no_grad()
def test_fedmitr_gives_a_student_and_its_pool(inversion: str, relabel: str) -> None:
    changes = {"inversion.mode": inversion, "relabel.mode": relabel, "inversion.steps": 4, "distill.rounds": 2}
    config = settings(**changes, **{"inversion.batch-size": 6, "distill.images-per-round": 12})
    uploads, metrics, stopwatch = two_uploads(), list[dict[str, Any]](), Stopwatch()
    with torch.enable_grad():
        made = fused(config, uploads, metrics, stopwatch)
    assert all(same(own.weights, before.weights) for own, before in zip(uploads, two_uploads(), strict=True))
    images = some_images(config, 3)
    student, start = (vit_of(config.model, weights)(images) for weights in (made.weights, average(uploads)))
    assert torch.equal(made.predict(images), student)
    assert not torch.equal(student, start)
    assert all(torch.isfinite(tensor).all() for tensor in made.weights.values())
    assert len(made.pool) == (12 if (inversion, relabel) == ("pri4", "drop") else 24)
    assert torch.isfinite(made.pool.images).all()
    if inversion != "pri4":  # whose images share their canvases
        assert len(made.pool.images.flatten(1).unique(dim=0)) == 24  # every round and batch has noise of its own
    # By pri4, three targets make twelve images: one batch. Otherwise two of six.
    batches = [(line["round"], line["batch"]) for line in metrics if line["stage"] == "inversion"]
    assert batches == ([(0, 0), (1, 0)] if inversion == "pri4" else [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert [line["round"] for line in metrics if line["stage"] == "distillation"] == [0, 1]
    assert set(metrics[-1]) == {"stage", "round", "high", "low", "kd", "curve"}
    json.dumps(metrics, allow_nan=False)
    assert set(stopwatch.seconds) == {"inversion", "distillation"}
    assert all(seconds > 0 for seconds in stopwatch.seconds.values())


@pytest.mark.parametrize("method", ["fedmitr", "dense"])
def test_batches_that_are_made_side_by_side_are_those_made_in_turn(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STEPS", "WIDTH"):
        monkeypatch.setattr(generator, name, 4)
    config, told = settings(method=method, **MANY), list[dict[str, Any]]()
    in_turn = fused(config)
    with threads(2):
        beside = fused(config, lines=told)
    assert torch.equal(in_turn.pool.images, beside.pool.images)
    assert same(in_turn.weights, beside.weights)
    batches = [(each["round"], each["batch"]) for each in told if each["stage"] in ("inversion", "generation")]
    assert sorted(batches) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("mode", "canvases"), [("sparse", 9), ("pri4", 3)])
def test_teachers_are_weighed_by_each_canvas_once(mode: str, canvases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pri4` takes four images from one canvas, which as wholes are one image: four times the evidence is none."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(Weigher, "refine", lambda _weigher, *images: seen.append(images))
    made = fused(settings(**MANY | {"inversion.mode": mode, "inversion.batch-size": 2}))
    for epoch, (images, targets) in enumerate(seen, 1):
        assert len(images) == len(images.flatten(1).unique(dim=0)) == len(targets) == epoch * canvases
    known, last = (
        {(image.numpy().tobytes(), int(y)) for image, y in zip(*pairs, strict=True)}
        for pairs in ((made.pool.images, made.pool.targets), seen[-1])
    )
    assert len(seen) == 2
    assert known == last


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
    rates, step = list[float](), Stepper.step

    def spy(stepper: Stepper, loss: torch.Tensor) -> None:
        step(stepper, loss)
        rates.append(stepper.schedules[0].get_last_lr()[0])

    monkeypatch.setattr(Stepper, "step", spy)
    monkeypatch.setattr(distil, "BATCH", 8)
    changes = {"inversion.mode": inversion, "relabel.mode": relabel, "inversion.steps": 4, "distill.rounds": 3}
    fused(settings(**changes, **{"distill.epochs-per-round": 2, "distill.images-per-round": 13}))
    assert len(rates) == 2 * sum(-(-r * images // 8) for r in (1, 2, 3))
    assert rates[-1] == 0
    assert all(rate > 0 for rate in rates[:-1])


def test_one_upload_is_inverted_and_distilled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1: the ensemble is the client's model, the average too, and with soft labels only the student stays it."""
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(rounds, "student_stepper", lambda vit, _, steps: Sgd(vit, 0.1, steps))
    (upload, _), images = two_uploads(), some_images(settings(), 3)
    made = fused(settings(), [upload])
    torch.testing.assert_close(made.weights, upload.weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(made.predict(images), a_vit(settings(), 0)(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("images", "classes"), [(20, 10), (23, 10), (7, 10), (1, 2)])
def test_targets_are_balanced(images: int, classes: int) -> None:
    config = settings(**{"distill.images-per-round": images, "model.num-classes": classes})
    drawn = torch.stack([balanced_targets(config, stream(seed)) for seed in range(40)])
    counts = F.one_hot(drawn, classes).sum(1)
    assert drawn.shape[1] == images
    assert (counts.max(1).values - counts.min(1).values <= 1).all()
    assert drawn.unique().tolist() == list(range(classes))  # the remainder falls on every class
    assert images == 1 or not drawn.equal(drawn.sort(1).values)


def test_the_stopwatch_adds_up_and_stops_on_errors() -> None:
    watch = Stopwatch({"a": 1.0})
    with pytest.raises(ValueError, match="here"), watch.stage("a"):
        raise ValueError("here")
    assert 1 < watch.seconds["a"] < 2

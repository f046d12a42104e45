"""Methods: one file each, found by name, and what each of them gives back."""

import json
import math
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tiny import Sgd, a_vit, an_upload, settings, some_images

from fedmitr_flwr import methods
from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation import distil, losses
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.scout import Weigher
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.methods import fedmitr, rounds
from fedmitr_flwr.methods.contract import Fused, Job, Stopwatch
from fedmitr_flwr.methods.rounds import balanced_targets
from fedmitr_flwr.vit.optim import Stepper

CPU = torch.device("cpu")


def fused(config: Config, metrics: list[dict[str, Any]] | None = None, stopwatch: Stopwatch | None = None) -> Fused:
    uploads = [an_upload(config, client, 10 + 20 * client) for client in range(2)]
    log = [] if metrics is None else metrics
    job = Job(uploads, config, CPU, lambda **values: log.append(values), stopwatch or Stopwatch())
    return methods.fuse(job)


KNOWN = [
    "adi",
    "coboosting",
    "dense",
    "ensemble",
    "fedavg",
    "feddf",
    "fedmedian",
    "fedmitr",
    "fedpft",
    "krum",
    "layerwise",
    "lda",
    "regmean",
    "ridge",
    "task_arithmetic",
    "ties",
    "tsv",
    "wudi",
]


def test_every_file_is_a_method() -> None:
    assert methods.available() == KNOWN
    assert all(callable(methods.load(name).fuse) and methods.load(name).__doc__ for name in KNOWN)


@pytest.mark.parametrize("name", ["fedmitra", "contract", "", "fedavg.fuse", "../fedavg"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        methods.load(name)
    assert str(refused.value).startswith(f"method = {name!r} is not one of: {', '.join(KNOWN)}")


def test_a_new_file_is_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_upload.py").write_text(
        '"""The first client\'s model."""\n'
        "from fedmitr_flwr.methods.contract import Fused, Job\n"
        "from fedmitr_flwr.vit.build import build_vit\n"
        "def fuse(job: Job) -> Fused:\n"
        "    vit = build_vit(job.config.model)\n"
        "    vit.load_state_dict(job.uploads[0].weights)\n"
        "    return Fused(vit, job.uploads[0].weights)\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert methods.available() == sorted([*KNOWN, "first_upload"])
    config = settings(method="first_upload")
    made = fused(config)
    images = some_images(config, 3)
    with torch.no_grad():
        assert torch.equal(made.predict(images), a_vit(config, 0)(images))


@torch.no_grad()
def test_fedavg_is_the_average() -> None:
    config = settings(method="fedavg")
    made = fused(config)
    wanted = average([an_upload(config, client, 10 + 20 * client) for client in range(2)])
    assert all(torch.equal(made.weights[name], tensor) for name, tensor in wanted.items())
    mean = a_vit(config, 5)
    mean.load_state_dict(wanted)
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
    metrics: list[dict[str, Any]] = []
    stopwatch = Stopwatch()
    made = fused(config, metrics, stopwatch)
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
        beside = fused(config, told)
    assert torch.equal(in_turn.pool.images, beside.pool.images)
    assert all(torch.equal(tensor, beside.weights[name]) for name, tensor in in_turn.weights.items())
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


@pytest.mark.parametrize("inversion", ["sparse", "pri4"])
def test_the_learning_rate_ends_at_zero_with_the_last_batch(inversion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over growing pools: the steps are counted ahead exactly."""
    rates: list[float] = []
    step = Stepper.step

    def spy(stepper: Stepper, loss: torch.Tensor) -> None:
        step(stepper, loss)
        rates.append(stepper.schedules[0].get_last_lr()[0])

    monkeypatch.setattr(Stepper, "step", spy)
    changes = {
        "inversion.mode": inversion,
        "distill.rounds": 3,
        "distill.epochs-per-round": 2,
    }
    monkeypatch.setattr(distil, "BATCH", 8)
    fused(settings(**changes, **{"distill.images-per-round": 13}))
    assert rates[-1] == 0
    assert all(rate > 0 for rate in rates[:-1])


def test_every_epoch_and_batch_has_its_own_noise() -> None:
    """After a single step the best image is the one before it: the noise itself."""
    one_step = {"inversion.mode": "dense", "inversion.steps": 1, "inversion.stops": "", "inversion.batch-size": 5}
    images = fused(settings(**one_step, **{"distill.rounds": 2})).pool.images
    assert len({tuple(image.flatten().tolist()) for image in images}) == 20


def test_fedmitr_is_repeatable() -> None:
    config = settings(**{"data.flip": True})
    torch.manual_seed(1)
    first = fused(config)
    torch.manual_seed(2)
    again, other = fused(config), fused(settings(seed=1))
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, again.weights[name]), name
    assert torch.equal(first.pool.images, again.pool.images)
    assert not torch.equal(first.pool.images, other.pool.images)


def test_the_uploads_are_left_alone() -> None:
    config = settings()
    uploads = [an_upload(config, client) for client in range(2)]
    before = [{name: tensor.clone() for name, tensor in upload.weights.items()} for upload in uploads]
    methods.load("fedmitr").fuse(Job(uploads, config, CPU, lambda **_: None))
    for upload, weights in zip(uploads, before, strict=True):
        assert all(torch.equal(upload.weights[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def test_one_upload_is_inverted_and_distilled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1: the ensemble is the client's model, the average too, and with soft labels only the student stays it."""
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(rounds, "student_stepper", lambda vit, _, steps: Sgd(vit, 0.1, steps))
    config = settings()
    upload = an_upload(config, 0)
    with torch.enable_grad():
        made = methods.load("fedmitr").fuse(Job([upload], config, CPU, lambda **_: None))
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


def test_rebirths_need_fewer_targets() -> None:
    config = settings(**{"inversion.mode": "pri4", "distill.images-per-round": 10})
    assert len(balanced_targets(config, stream(0))) == 3


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

"""Methods: one file each, found by name or, like rules and priors, outside of the package; what they give back."""

import json
import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tiny import Sgd, a_vit, an_upload, fused, same, settings, some_images, two_uploads
from torch.nn import functional as F

from fedmitr_flwr import methods
from fedmitr_flwr.cli import main
from fedmitr_flwr.common import outside
from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.fingerprint import of_method
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation import distil, losses
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion import generator, invert
from fedmitr_flwr.inversion.scout import Weigher
from fedmitr_flwr.inversion.trajectory import prior_named
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.methods import fedmitr, rounds
from fedmitr_flwr.methods.contract import Stopwatch
from fedmitr_flwr.methods.rounds import balanced_targets
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit.build import vit_of
from fedmitr_flwr.vit.optim import Stepper
from fedmitr_flwr.vit.tokens import all_positions, patchify, take

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


def test_batches_that_are_made_side_by_side_are_those_made_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of DENSE; those of FedMITR are in test_resume.py."""
    for name in ("STEPS", "WIDTH"):
        monkeypatch.setattr(generator, name, 4)
    config, told = settings(method="dense", **MANY), list[dict[str, Any]]()
    in_turn = fused(config)
    with threads(2):
        beside = fused(config, lines=told)
    assert torch.equal(in_turn.pool.images, beside.pool.images)
    assert same(in_turn.weights, beside.weights)
    batches = [(each["round"], each["batch"]) for each in told if each["stage"] == "generation"]
    assert sorted(batches) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("mode", "batch", "canvases"), [("sparse", 2, 9), ("pri4", 2, 3), ("pri4", 3, 3)])
def test_teachers_are_weighed_by_each_canvas_once(
    mode: str, batch: int, canvases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pri4` takes four images from one canvas, which as wholes are one image: four times the evidence is none.

    Also where a batch is too large for the memory and made by halves: their rebirths lie otherwise than a whole one's.
    """
    whole, tried = invert.Trajectory, set[int]()

    def small_memory(ensemble: Any, starts: torch.Tensor, *rest: Any) -> Any:
        tried.add(len(starts))
        if len(starts) > 2:
            raise MemoryError
        return whole(ensemble, starts, *rest)

    monkeypatch.setattr(invert, "Trajectory", small_memory)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(Weigher, "refine", lambda _weigher, *images: seen.append(images))
    made = fused(settings(**MANY | {"inversion.mode": mode, "inversion.batch-size": batch}))
    assert max(tried) == batch
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


# --- from outside the package: by the path of a file or as an entry point

FIRST = '''"""The model of the first client, as it is."""

from dataclasses import dataclass

from fedmitr_flwr.methods.contract import Fused, Job
from fedmitr_flwr.vit.build import vit_of


@dataclass
class Settings:
    client: int = 0


def fuse(job: Job) -> Fused:
    weights = job.uploads[Settings().client].weights
    return Fused(vit_of(job.config.model, weights), weights)
'''
SHORT = ["partition.clients=2", "data.train-limit=60", "local.epochs=1", "screen.mode=off", "threads=1"]
SHORT += ["data.test-limit=20", "model.depth=1", "model.width=16"]


@pytest.fixture
def first(tmp_path: Path) -> Path:
    path = tmp_path / "first.py"
    path.write_text(FIRST, encoding="utf-8")
    return path


@pytest.mark.parametrize("where", ["word", "file"])
def test_a_file_anywhere_is_a_method(first: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is relative to the current folder, or to the file that names it."""
    named = ["method=first.py"]
    if where == "word":
        monkeypatch.chdir(tmp_path)
    else:
        (tmp_path / "own.toml").write_text('method = "first.py"\n')
        named = ["-c", str(tmp_path / "own.toml")]
    assert main(["run", *named, *SHORT, f"out-dir={tmp_path / 'runs'}"]) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("first-0-")
    folder = RunFolder.open(path)
    result = folder.read_result()
    assert (result["method"], result["core"]) == (str(first), of_method(str(first)))
    assert same(load_tensors(folder.model_path)[0], folder.load_uploads()[0].weights)
    monkeypatch.chdir(tmp_path)
    assert main(["fuse", str(path), "--method", "first.py"]) == 0
    assert (path / "fused" / "first-1" / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "method: there is no Python file .*mine.py; give the path of one"),
        ("def fuse(:", r"method: .*mine.py cannot be imported \(SyntaxError: .*\); mend it"),
        ("fuse = 1", r"method = '.*mine.py' has no function fuse\(job\); write one"),
        ("def fuse(job):\n    return job.uploads[0]", r"method = '.*mine.py' returned a Upload; return .*\.Fused"),
    ],
)
def test_a_file_that_is_none_is_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert main(["run", f"method={path}", *SHORT, f"out-dir={tmp_path / 'runs'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"fedmitr: error: {message}.*", line), line


def test_a_file_that_has_changed_is_read_again(first: Path) -> None:
    before = methods.load(str(first))
    assert methods.load(str(first)) is before
    first.write_text(FIRST.replace("client: int = 0", "client: int = 1"))
    assert methods.load(str(first)).Settings().client == 1


def test_an_installed_package_offers_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point has a name and a module; here the module is one that is there."""
    point = EntryPoint("theirs", "fedmitr_flwr.methods.fedavg", "fedmitr_flwr.methods")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **wanted: EntryPoints([point]).select(**wanted))
    assert "theirs" in methods.available()
    assert methods.load("theirs") is methods.load("fedavg")
    with pytest.raises(ConfigError, match=r"method = 'there' is not one of: .*; did you mean theirs\?"):
        methods.load("there")


RULE = '''"""Products of the teachers' probabilities, by weight."""


def part(logits, weights):
    return weights * logits.log_softmax(-1)


def join(total, part):
    return total + part
'''
PRIOR = '''"""Grey pictures."""


def prior(images):
    return 2 * images.square().flatten(1).sum(1)
'''


def test_a_file_is_a_rule_of_the_ensemble(tmp_path: Path) -> None:
    """The product of two experts, by hand; and what it teaches of whole images is what it decides."""
    (tmp_path / "product.py").write_text(RULE)
    config = settings(**{"ensemble.combine": str(tmp_path / "product.py")})
    uploads = [an_upload(config, client) for client in range(2)]
    ensemble = Ensemble.of(uploads, config.model, config.ensemble, config.ensemble.combine)
    images = some_images(config, 3)
    with torch.no_grad():
        first, second = (a_vit(config, client)(images).softmax(1) for client in range(2))
        wanted = first ** ensemble.weights[0] * second ** ensemble.weights[1]
        torch.testing.assert_close(ensemble(images).softmax(1), wanted / wanted.sum(1, keepdim=True))
        patches = patchify(images, config.model.patch_size)
        taught = ensemble.scores(patches, all_positions(patches)).cls
    torch.testing.assert_close(taught, ensemble(images))


def test_a_file_is_a_prior_of_the_images(tmp_path: Path) -> None:
    """2 |x|² has the gradient 4 x, of the alive pixels; and a run with it makes paler images."""
    (tmp_path / "grey.py").write_text(PRIOR)
    path = str(tmp_path / "grey.py")
    canvas = torch.rand(2, 4, 3, generator=stream(0))
    alive = torch.tensor([[0, 2], [3, 1]])
    loss, slope = prior_named(path)(canvas, alive, 1)(take(canvas, alive))
    torch.testing.assert_close(loss, 2 * canvas.square().flatten(1).sum(1))
    torch.testing.assert_close(slope, 4 * take(canvas, alive))
    long = {"inversion.steps": 30}
    plain, grey = (fused(settings(**long, **{"inversion.prior": prior})).pool.images for prior in ("tv", path))
    assert grey.square().mean() < plain.square().mean()


@pytest.mark.parametrize(
    ("key", "wrong", "needed"),
    [
        (
            "ensemble.combine",
            "use logits \\| probs, or the path of a .py file; did you",
            "has no function part; write part and join",
        ),
        ("inversion.prior", "use tv", r"has no function prior\(images\); write one"),
    ],
)
def test_a_file_without_what_is_needed_is_one_line(key: str, wrong: str, needed: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = 'prods' is not possible; {wrong}"):
        settings(**{key: "prods"})
    (tmp_path / "x.py").write_text("")
    with pytest.raises(ConfigError, match=rf"{key} = '.*x\.py' {needed}"):
        methods.check(settings(**{key: str(tmp_path / "x.py")}))  # before anything is trained


def test_checkpoints_are_of_the_file_s_contents(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("a = 1")
    before = outside.contents(str(path))
    path.write_text("a = 2")
    assert outside.contents(str(path)) != before
    assert outside.contents("tv") == "tv"
    assert outside.contents(str(tmp_path / "none.py")) == str(tmp_path / "none.py")

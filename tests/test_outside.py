"""From outside the package: methods, rules of the ensemble and priors, by the path of a file or as an entry point."""

import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from tiny import a_vit, an_upload, fused, same, settings, some_images

from fedmitr_flwr import methods
from fedmitr_flwr.cli import main
from fedmitr_flwr.common import outside
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.fingerprint import of_method
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.trajectory import prior_named
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit.tokens import all_positions, patchify, take

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
    monkeypatch.setattr(outside, "entry_points", lambda **wanted: EntryPoints([point]).select(**wanted))
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
        ("ensemble.combine", "use logits \\| probs; did you", "has no function part; write part and join"),
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

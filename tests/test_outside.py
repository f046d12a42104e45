"""Methods from outside the package: a file by its path, and an entry point of an installed package."""

import logging
import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

from fedmitr_flwr import methods
from fedmitr_flwr.cli import main
from fedmitr_flwr.common import outside
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.fingerprint import of_method
from fedmitr_flwr.runs.folder import RunFolder

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


@pytest.fixture
def first(tmp_path: Path) -> Path:
    path = tmp_path / "first.py"
    path.write_text(FIRST, encoding="utf-8")
    return path


@pytest.mark.parametrize("where", ["word", "file"])
def test_a_file_anywhere_is_a_method(
    first: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its path is relative to the current folder, or to the file that names it."""
    named = ["method=first.py"]
    if where == "word":
        monkeypatch.chdir(tmp_path)
    else:
        (tmp_path / "own.toml").write_text('method = "first.py"\n')
        named = ["-c", str(tmp_path / "own.toml")]
    with caplog.at_level(logging.INFO):
        assert main(["run", *named, *SHORT, f"out-dir={tmp_path / 'runs'}"]) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("first-0-")
    folder = RunFolder.open(path)
    assert folder.read_result()["method"] == str(first)
    assert folder.read_result()["core"] == of_method(str(first))
    wanted, model = folder.load_uploads()[0].weights, load_tensors(folder.model_path)[0]
    assert model.keys() == wanted.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in wanted.items())
    monkeypatch.chdir(tmp_path)
    assert main(["fuse", str(path), "--method", "first.py"]) == 0
    assert (path / "fused" / "first-1" / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "method: there is no Python file .*mine.py; give the path of one"),
        ("def fuse(:", r"method: .*mine.py cannot be imported \(SyntaxError: .*\); mend it"),
        ("x = 1 / 0", r"method: .*mine.py cannot be imported \(ZeroDivisionError: division by zero\); mend it"),
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

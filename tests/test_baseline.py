"""baselines/fedmitr: in the form that Flower asks for, and one round of it on a tiny data set."""

import re
import sys
import tomllib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from datasets import Dataset
from flwr.supercore.fab_format_version import normalize_and_validate_fab_format
from local_grid import LocalGrid, server_context
from PIL import Image
from tiny import ROOT

import fedmitr_flwr

HOME = ROOT / "baselines" / "fedmitr"
PROJECT: dict[str, Any] = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(HOME))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedmitr"]:
        del sys.modules[name]


def test_it_has_the_form_of_a_baseline() -> None:
    """The six modules, the front matter and the sections that Flower's template and its structure test ask for."""
    there = {path.stem for path in (HOME / HOME.name).glob("*.py")}
    assert there == {"__init__", "client_app", "dataset", "model", "server_app", "strategy", "utils"}
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(readme.split("---\n")[1])
    assert front.keys() == {"title", "url", "labels", "dataset"}
    assert 4 <= len(front["labels"]) <= 10
    sections = ("About this baseline", "Experimental Setup", "Environment Setup", "Running the Experiments")
    assert tuple(re.findall(r"^## (.+)$", readme, re.MULTILINE)) == sections
    assert readme.startswith("---\ntitle:")
    assert re.search(r"```\n\n\|", readme.partition("Running the Experiments")[2])  # a command, then its table
    assert normalize_and_validate_fab_format(PROJECT).fab_format_version == 1
    assert f"fedmitr-flwr=={fedmitr_flwr.__version__}" in PROJECT["project"]["dependencies"]


def images(path: Path, number: int) -> None:
    """Class y is bright in two rows of its own."""
    cells = []
    for label in range(number):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[2 * (label % 10) : 2 * (label % 10) + 2] = 200
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    Dataset.from_dict({"image": cells, "label": [label % 10 for label in range(number)]}).to_parquet(str(path))


@pytest.mark.usefixtures("baseline")
def test_one_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients train on different images that are all there are; what is saved is the student."""
    from fedmitr import dataset, strategy
    from fedmitr.client_app import app as client
    from fedmitr.server_app import app as server

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for split, number in (("train", 80), ("test", 20)):
        images(tmp_path / f"{split}.parquet", number)
    settings = PROJECT["tool"]["flwr"]["app"]["config"] | {
        **{"data-dir": str(tmp_path), "out-dir": str(tmp_path / "out"), "local-epochs": 1, "rounds": 1, "alpha": 5.0},
        **{"images-per-round": 10, "epochs-per-round": 1},
    }
    made: list[strategy.OneShot] = []
    monkeypatch.setattr("fedmitr.server_app.OneShot", lambda *given: made.append(strategy.OneShot(*given)) or made[0])
    grid = LocalGrid(client, 2)
    for context in grid.contexts.values():
        context.run_config = settings
    server(grid, server_context(settings))
    shares = [dataset.load_client(settings, client, 2) for client in range(2)]
    assert sum(map(len, shares)) == 80
    assert (made[0].fused.config.model.img_size, len(made[0].fused.accuracy["local"])) == (28, 2)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    student = made[0].fused.student.state_dict()
    assert all((tensor == student[name]).all() for name, tensor in loaded.state_dict().items())

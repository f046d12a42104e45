"""docs/library.ipynb: its cells run one after the other, on a budget of seconds, and say what the text says."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT

import fedmitr_flwr

FEW = {"inversion.steps": 4, "distill.rounds": 1, "distill.images-per-round": 10, "distill.epochs-per-round": 1}


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fedmitr_flwr, "fuse", partial(fedmitr_flwr.fuse, settings=FEW), raising=False)
    cells = json.loads((ROOT / "docs" / "library.ipynb").read_text(encoding="utf-8"))["cells"]
    found: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]).replace("EPOCHS = 30", "EPOCHS = 1").replace("repeat(20)", "repeat(1)"), found)
    images, labels = found["test"]
    with torch.no_grad():
        accuracy = (found["student"](images).argmax(1) == labels).float().mean().item()
    assert found["result"].accuracy["student"] == pytest.approx(100 * accuracy, abs=0.01)
    assert (found["ensemble"].weights.shape, found["made"].images.shape) == ((3, 10), (10, 1, 8, 8))

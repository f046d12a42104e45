"""The ServerApp before and around a run: what is checked without a node, what is said of the nodes."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from local_grid import Federate, LocalGrid

from client_app.app import app as client_app

OPTIONS = "flower.options"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"local.epochz": 2}, "local.epochz"),
        ({"local.epochs": "nine"}, "local.epochs = 'nine'"),
        ({"method": "fedmagic"}, "fedmagic"),
        ({"method": "ensemble", "evaluate.where": "clients"}, "no single model"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"model.name": "vit_nothing"}, "vit_nothing"),
        ({"model.weights": "none.safetensors"}, "none.safetensors"),
        ({"data.source": "parquet", "data.path": "/absent"}, "data.path"),
        ({"data.source": "parquet", "data.path": "/absent", "flower.strategy": "fedavg"}, "data.path"),
        ({"flower.rounds": 2}, "flower.rounds = 2"),
        ({"flower.strategy": "fedavgg"}, "flower.strategy = 'fedavgg' is unknown; use oneshot | fedavg"),
        ({"flower.strategy": "fedavg", "upload.dtype": "float16"}, "half precision"),
        ({"flower.strategy": "fedavg", "resume-from": "x"}, "resume-from needs"),
        ({OPTIONS: "eta=0.1"}, "is of a strategy that Flower ships; leave it empty"),
        ({"flower.strategy": "fedmedian", OPTIONS: "eta=0.1"}, "'fedmedian'; it has none; leave it empty"),
        ({"flower.strategy": "fedadam", OPTIONS: "eat=0.1"}, "eat is no option of flower.strategy = 'fedadam'; it has"),
        ({"flower.strategy": "fedavgm", OPTIONS: "server_momentum=1"}, "server_momentum = 1 is not possible; use 0"),
        ({"flower.strategy": "qfedavg", OPTIONS: "client_learning_rate=0"}, "use 1e-12 to inf"),
    ],
)
def test_bad_input_is_named_before_any_node_is_asked(
    federate: Federate, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str
) -> None:
    grid = LocalGrid(client_app, 2)
    assert federate(grid, fails=re.escape(told), **settings) is None  # no folder is made
    assert grid.asked == []
    assert sum(record.message.startswith("bad input: ") for record in caplog.records) == 1


def test_a_method_is_checked_with_the_clients_that_there_are(federate: Federate) -> None:
    grid = LocalGrid(client_app, 3)  # the default of partition.clients is 5
    federate(grid, fails=r"krum.hostile = 1 needs 4 uploads, not 3", method="krum")
    assert not grid.clients_asked("train")


def test_a_run_by_two_nodes_of_six_clients_and_a_relative_path(
    federate: Federate, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    federate(LocalGrid(client_app, 2), **{"out-dir": "runs", "partition.clients": 6})
    os.umask(before)
    assert "partition.clients = 6 has no effect here: there are 2 clients, one for each node" in caplog.text
    assert "server_test_accuracy_student" in caplog.text
    (folder,) = (tmp_path / "runs").iterdir()
    assert f'out-dir = "{tmp_path / "runs"}"' in (folder / "config.toml").read_text()
    assert not [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]

"""The ServerApp before and around a run: what is checked without a node, what is said of the nodes."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_grid import TINY, LocalGrid, server_context, task_identity

from client_app.app import app as client_app
from fedmitr_flwr.common.errors import ConfigError, ModelError
from server_app.app import app as server_app


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    before = os.umask(0o022)
    with task_identity():
        yield
    os.umask(before)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"method": "fedmagic"}, ConfigError),
        ({"flower.rounds": 2}, ConfigError),
        ({"device": "gpu"}, ConfigError),
        ({"model.weights": "none.safetensors"}, ModelError),
    ],
)
def test_bad_input_is_named_before_any_node_is_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, object], error: type[Exception]
) -> None:
    grid = LocalGrid(client_app, 2)
    with pytest.raises(error):
        server_app(grid, server_context(TINY | {"out-dir": str(tmp_path)} | settings))
    assert grid.asked == []
    assert not list(tmp_path.iterdir())
    assert sum(record.message.startswith("bad input: ") for record in caplog.records) == 1


def test_a_run_by_two_nodes_of_six_clients_and_a_relative_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    monkeypatch.chdir(tmp_path)
    server_app(LocalGrid(client_app, 2), server_context(TINY | {"out-dir": "runs", "partition.clients": 6}))
    assert "partition.clients = 6 has no effect here: there are 2 clients, one for each node" in caplog.text
    (folder,) = (tmp_path / "runs").iterdir()
    assert f'out-dir = "{tmp_path / "runs"}"' in (folder / "config.toml").read_text()
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert "server_test_accuracy_student" in caplog.text

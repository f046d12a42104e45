"""`track`: the numbers of metrics.jsonl reach the tracker in order, and no run is lost by it."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import settings

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config.sections import TRACKERS
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.track import OPEN, points

LINE = {"stage": "inversion", "round": 1, "name": "x", "curve": {"step": [0, 4], "loss": [3.0, 2.0]}, "alive": 0.5}
POINTS = [{"inversion/curve/loss": 3.0}, {"inversion/curve/loss": 2.0}, {"inversion/round": 1, "inversion/alive": 0.5}]
ALL = [(name, value, step) for step, point in enumerate(POINTS + POINTS) for name, value in point.items()]


class Fake(ModuleType):
    """A package that remembers what it was given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.sent: list[tuple[str, float, int]] = []
        self.ends: list[object] = []


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake("wandb")
    run = SimpleNamespace(
        log=lambda point, step: fake.sent.extend((name, value, step) for name, value in point.items()),
        finish=lambda exit_code: fake.ends.append(exit_code),
    )
    monkeypatch.setattr(fake, "init", lambda **_: run, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def a_run(where: Path, kind: str, work: Callable[[RunFolder], Any] = lambda _: None) -> RunFolder:
    """Two lines, in two starts."""
    folder = RunFolder.create(settings(track=kind, **{"out-dir": str(where)}), "run")
    for _ in range(2):
        with folder.at_work():
            folder.log_metrics(**LINE)
            work(folder)
    return folder


def test_points_by_hand() -> None:
    assert points(LINE) == POINTS
    assert points({"round": 2, "accuracy": 50.0, "of": {"a": 1}}) == [{"round/round": 2, "round/accuracy": 50.0}]
    assert set(TRACKERS) == OPEN.keys()


def test_a_tracker_goes_on_behind_what_was_there(tmp_path: Path, wandb: Fake) -> None:
    a_run(tmp_path, "wandb")
    assert (wandb.sent, wandb.ends) == (ALL, [0, 0])


def test_a_run_that_fails_ends_so_and_one_that_the_tracker_fails_goes_on(
    tmp_path: Path, wandb: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError):
        a_run(tmp_path / "a", "wandb", lambda _: {}["nothing"])
    assert wandb.ends == [1]
    monkeypatch.setattr(wandb, "sent", None)
    folder = a_run(tmp_path / "b", "wandb")
    assert len(folder.metrics_path.read_text().splitlines()) == 2
    assert caplog.text.count("track = 'wandb' is given up") == 2  # once in each start
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    with pytest.raises(ConfigError, match=r"track = 'wandb' cannot be started \(division by zero\); mend that"):
        a_run(tmp_path / "c", "wandb")


def test_what_is_not_installed_is_said_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.runs.track.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="track = 'mlflow' needs the package mlflow: pip install mlflow; or leave"):
        pipeline.run(settings(track="mlflow", **{"out-dir": str(tmp_path)}), "run")
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_a_whole_run(tmp_path: Path) -> None:
    """Read back by TensorBoard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = pipeline.run(settings(track="tensorboard", method="fedavg", **{"out-dir": str(tmp_path)}), "run")
    with folder.at_work():
        folder.log_metrics(**LINE)
    (_, latest) = sorted((folder.path / "tensorboard").iterdir())
    events = EventAccumulator(str(latest)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("inversion/curve/loss")] == [(0, 3.0), (1, 2.0)]
    first = EventAccumulator(str(min((folder.path / "tensorboard").iterdir()))).Reload()
    student = folder.read_result()["accuracy"]["student"]
    assert first.Scalars("accuracy/student")[0].value == pytest.approx(student, abs=1e-4)


@pytest.mark.filterwarnings("ignore")  # its own use of SQLAlchemy and others
def test_mlflow_has_all(tmp_path: Path) -> None:
    """Where it is installed (mlflow-skinny)."""
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    a_run(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("fedmitr").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    found = {
        step.step: step.value
        for run in runs
        for step in client.get_metric_history(run.info.run_id, "inversion/curve/loss")
    }
    assert found == {0: 3.0, 1: 2.0, 3: 3.0, 4: 2.0}
    assert runs[0].data.params["seed"] == "0"


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, it starts and leaves a run to be synchronised."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = a_run(tmp_path, "wandb")
    assert len(list((folder.path / "wandb").glob("offline-run-*/*.wandb"))) == 2

"""Metrics in a tracker, beside metrics.jsonl: the setting `track`. A point is numbers by their names."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError

log = logging.getLogger("fedmitr")

Point = dict[str, float]
Add = Callable[[Mapping[str, Any]], None]
Open = Callable[[Path, Mapping[str, object]], tuple[Callable[[Point, int], None], Callable[[bool], None]]]


def require(kind: str) -> None:
    """Raise ConfigError if the tracker's package is not installed."""
    if kind and find_spec(kind) is None:
        raise ConfigError(f"track = {kind!r} needs the package {kind}: pip install {kind}; or leave track empty")


@contextmanager
def tracking(kind: str, folder: Path, settings: Mapping[str, object], metrics: Path) -> Iterator[Add | None]:
    """Give what adds a line of metrics.jsonl to the tracker `kind`, if any, behind those that `metrics` has.

    A tracker that fails later, such as one behind a network, does not end the run: it is given up, with a warning.

    Raises:
        ConfigError: it cannot be started.
    """
    if not kind:
        yield None
        return
    require(kind)
    try:
        send, end = OPEN[kind](folder, settings)
    except Exception as error:  # of any type: it is another's program
        raise ConfigError(f"track = {kind!r} cannot be started ({error}); mend that, or leave track empty") from error
    before = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    step, given_up = sum(len(points(json.loads(line))) for line in before), False

    def guarded(work: Callable[..., None], *given: Any) -> None:
        nonlocal given_up
        try:
            if not given_up:
                work(*given)
        except Exception as error:
            given_up = True
            log.warning("track = %r is given up (%s); metrics.jsonl has everything", kind, error)

    def add(line: Mapping[str, Any]) -> None:
        nonlocal step
        for point in points(line):
            guarded(send, point, step)
            step += 1

    try:
        yield add
    except BaseException:
        guarded(end, False)
        raise
    guarded(end, True)


def points(line: Mapping[str, Any]) -> list[Point]:
    """One for each step of the line's curve, and one of its own numbers."""
    stage, curve = str(line.get("stage", "round")), line.get("curve") or {}
    steps = [
        {f"{stage}/curve/{name}": values[place] for name, values in curve.items() if name != "step"}
        for place in range(len(curve.get("step", ())))
    ]
    return [*steps, {f"{stage}/{name}": value for name, value in line.items() if isinstance(value, int | float)}]


def _tensorboard(folder: Path, settings: Mapping[str, object]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in settings.items()))

    def send(point: Point, step: int) -> None:
        for name, value in point.items():
            writer.add_scalar(name, value, step)

    return send, lambda _: writer.close()


def _wandb(folder: Path, settings: Mapping[str, object]) -> Any:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "fedmitr")
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(settings), reinit="create_new")
    return lambda point, step: run.log(point, step=step), lambda well: run.finish(exit_code=0 if well else 1)


def _mlflow(folder: Path, settings: Mapping[str, object]) -> Any:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedmitr")
    found = client.get_experiment_by_name(name)
    run = client.create_run(found.experiment_id if found else client.create_experiment(name), run_name=folder.name)
    number = run.info.run_id
    client.log_batch(number, params=[Param(key, str(value)) for key, value in settings.items()])

    def send(point: Point, step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(number, [Metric(name, value, now, step) for name, value in point.items()])

    return send, lambda well: client.set_terminated(number, "FINISHED" if well else "FAILED")


OPEN: dict[str, Open] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}

"""`fedmitr compare`: runs, and what else was made of their uploads, side by side: as text, and as a page."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import RunError, printable
from ..common.files import absolute, write_text
from ..config import Config
from ..config.text import toml_value
from ..runs.folder import RunFolder
from . import charts
from .figures import heat_map
from .page import OTHER_SHAPE, gain, scaled, svg, template
from .words import data_set, skew

log = logging.getLogger("fedmitr")

HEAD = (
    *("run", "method", "accuracy %", "FedAvg %", "gain", "ensemble %", "worst class %", "NLL", "ECE %"),
    *("images", "server s", "up MB"),
)
_PLACES = ("out-dir", "resume-from")


def compare(paths: Sequence[Path]) -> tuple[str, Path]:
    """A table of these runs and the fusions in them, and the path of compare.html, in the first one's folder.

    Raises:
        RunError: one of them has not ended and has no fusion that has; or its result is not what a run has written.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in map(absolute, paths):
        found |= _results(path)
    try:
        rows = [_row(name, result) for name, result in found.items()]
        page = template("compare.html").render(
            title=f"{len(found)} runs compared",
            about="; ".join(dict.fromkeys(_about(result) for result in found.values())),
            head=HEAD,
            rows=rows,
            chart=svg(charts.runs(found), "Points: accuracy of each run's student, between FedAvg and ensemble"),
            recall=svg(_recall(found), "Heat map: recall by run and class"),
            names=list(map(printable, found)),
            settings=_differing([result["config"] for result in found.values()]),
        )
    except OTHER_SHAPE as error:
        raise RunError(f"a result.json of {', '.join(found)} is not that of a run ({error!r}); restore it") from error
    out = absolute(paths[0]) / "compare.html"
    write_text(out, page)
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    return "\n".join(_line(row, widths) for row in (HEAD, *rows)), out


def _results(path: Path) -> dict[str, dict[str, Any]]:
    """By name: a run's, and those of its fusions that have ended."""
    fusions = sorted(path.glob("fused/*/result.json"))
    own = RunFolder(path, Config())
    found = {} if fusions and not own.finished else {path.name: own.read_result()}
    if not found:
        log.warning("%s has not ended; only its fusions are shown", path)
    below = (RunFolder(each.parent, Config()) for each in fusions)
    return found | {f"{path.name}/{folder.path.name}": folder.read_result() for folder in below}


def _about(result: Mapping[str, Any]) -> str:
    return printable(f"{data_set(result['config'])}, {result['clients']} clients, {skew(result['config'])}")


def _row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy, calibration = result["accuracy"], result.get("calibration") or {}
    percents = (accuracy["student"], accuracy["fedavg"], accuracy["ensemble"], accuracy.get("worst_class"))
    student, fedavg, ensemble, worst = (scaled(value, 1, 2) for value in percents)
    quality = (scaled(calibration.get("nll"), 1, 3), scaled(calibration.get("ece"), 1, 2))
    sent = [value for value in result["bytes_up"] if value is not None]
    cost = (scaled(result.get("server_seconds"), 1, 1), scaled(sum(sent) if sent else None, 1e6, 2))
    names = printable(name), printable(result["method"])
    return (*names, student, fedavg, gain(accuracy), ensemble, worst, *quality, str(result["synthetic_images"]), *cost)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(row, widths, strict=True)
    return "  ".join(f"{cell:<{width}}" if at < 2 else f"{cell:>{width}}" for at, (cell, width) in enumerate(cells))


def _recall(found: Mapping[str, Mapping[str, Any]]) -> Any:
    classes = list(dict.fromkeys(name for result in found.values() for name in result["accuracy"]["per_class"]))
    if not classes:
        return None
    values = [[result["accuracy"]["per_class"].get(name) for name in classes] for result in found.values()]
    grid = np.array(values, dtype=float)  # None becomes NaN
    texts = [["-" if cell != cell else f"{cell:.0f}" for cell in row] for row in grid.tolist()]
    rows = [f"{number + 1}" for number in range(len(found))]
    return heat_map(grid, rows, classes, ("class", "run"), "recall, %", texts if len(classes) <= 25 else None)


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Settings that are not the same in all, with each run's value."""
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in _PLACES]
    shown = [(key, *("-" if key not in config else toml_value(config[key]) for config in configs)) for key in keys]
    return [row for row in shown if len(set(row[1:])) > 1]

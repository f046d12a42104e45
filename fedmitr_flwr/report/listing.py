"""`fedmitr list`: the runs in a folder as a table, newest first. It reads small files only, and no weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError, RunError, printable
from ..common.files import absolute, read_text
from ..config import Config
from ..config.sections import ONE_SHOT
from ..config.text import read_flat
from ..runs.folder import HOME, RunFolder
from .words import data_set

_HEAD = ("run", "method", "data", "clients", "student", "FedAvg", "ensemble", "state")
_ALIGNED = "<<<>>>><"
_MADE = ("student", "fedavg", "ensemble")


def listed(folder: Path | None) -> Iterator[str]:
    """A line for each run in `folder` (default: where run folders are made), in columns under a head.

    Raises:
        RunError: there is no run.
    """
    place = absolute(folder or HOME, "the folder")
    found = sorted(place.glob("[!.]*/config.toml"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        raise RunError(f"there is no run in {place}; `fedmitr run` makes one, or give the folder of others")
    rows = [_HEAD, *(_row(path.parent) for path in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, _ALIGNED, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, width, side in cells).rstrip()


def _row(path: Path) -> tuple[str, ...]:
    run, name = RunFolder(path, Config()), printable(path.name)
    try:
        flat: dict[str, Any] = Config().to_flat() | read_flat(path / "config.toml")
        method = flat["method"] if flat["flower.strategy"] == ONE_SHOT else flat["flower.strategy"]
        about = name, printable(str(method)), printable(data_set(flat)), str(flat["partition.clients"])
        if not run.finished:
            return *about, "", "", "", f"{len(run.upload_paths())} uploads, not finished"
        accuracy = json.loads(read_text(run.result_path))["accuracy"]
        return *about, *("-" if accuracy[kind] is None else f"{accuracy[kind]:.2f}" for kind in _MADE), "finished"
    except (ConfigError, OSError, ValueError, TypeError, LookupError):  # of another program, or damaged
        return name, "", "", "", "", "", "", "cannot be read"

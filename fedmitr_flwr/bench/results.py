"""The results of a bench, all together: from its folder, or from one file that holds what the tables need.

In the file (JSON lines) the first line has what all cells share, and each further line is one cell without that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import RunError, unread
from ..common.files import write_text
from ..config.text import PATHS
from .store import read_manifest, read_result

Entry = Mapping[str, Any]  # a result.json, and under `bench` the cell's place in the grid


@dataclass(frozen=True)
class Results:
    """What is there of a grid."""

    name: str  # of the bench
    reference: str  # the label that others are tested against
    entries: tuple[Entry, ...]  # finished cells, in the grid's order, without those that only chose settings
    missing: tuple[Mapping[str, Any], ...]  # the places of the cells that are not finished


def load(path: Path) -> Results:
    """Read a bench's folder, or a file of `save`.

    Raises:
        RunError: it is neither.
    """
    return _from_folder(path) if path.is_dir() else _from_file(path)


def _from_folder(path: Path) -> Results:
    manifest = read_manifest(path)
    entries, missing = [], []
    for place in manifest["cells"]:
        result = read_result(path / place["folder"] / "result.json")
        about = {key: value for key, value in place.items() if key != "folder"}
        if about["tuning"]:
            continue
        if result is None:
            missing.append(about)
        else:
            config = {key: value for key, value in result["config"].items() if key not in PATHS}
            entries.append({**result, "config": config, "bench": about})
    return Results(manifest["name"], manifest["reference"], tuple(entries), tuple(missing))


def _from_file(path: Path) -> Results:
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        entries = tuple(_merged(head["common"], line) for line in lines)
        return Results(head["name"], head["reference"], entries, tuple(head["missing"]))
    except (OSError, ValueError, LookupError) as error:
        raise RunError(unread("bench folder or results.jsonl", path, error)) from error


def save(results: Results, path: Path) -> None:
    """Write one file that `load` reads back."""
    common = _common(results.entries)
    head = {"name": results.name, "reference": results.reference, "missing": results.missing, "common": common}
    lines = [head, *(_without(common, entry) for entry in results.entries)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _common(entries: Sequence[Entry]) -> dict[str, Any]:
    """What all entries have alike, also within tables; nothing of a single one, which would leave no cell."""
    first, *others = entries or [{}]
    shared: dict[str, Any] = {}
    for key, value in first.items():
        if all(key in other and other[key] == value for other in others):
            shared[key] = value
        elif isinstance(value, Mapping) and all(isinstance(other.get(key), Mapping) for other in others):
            shared[key] = _common([value, *(other[key] for other in others)])
    return shared


def _without(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    left = {}
    for key, value in entry.items():
        if key not in common:
            left[key] = value
        elif value != common[key]:
            left[key] = _without(common[key], value)
    return left


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `_without`, up to the order of keys."""
    both = [key for key in common if isinstance(common[key], Mapping) and isinstance(own.get(key), Mapping)]
    return {**common, **own, **{key: _merged(common[key], own[key]) for key in both}}

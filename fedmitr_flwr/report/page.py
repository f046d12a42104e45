"""`fedmitr report`: one self-contained HTML page of one run, from what the run left in its folder."""

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from matplotlib.figure import Figure

from ..common.errors import RunError, printable, unread
from ..common.files import absolute, read_text, write_text
from ..config import Config
from ..config.text import toml_value
from ..diagnostics.table import NAME, tables
from ..runs.folder import RunFolder
from .charts import accuracies, as_svg, confusion, curves, diagnosed
from .figures import save_partition
from .words import data_set, evaluated, model, skew

Rows = list[tuple[str, ...]]

# What reading a result or a metric of another shape raises: they are JSON, in which anything may stand anywhere.
_OTHER_SHAPE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def write_page(run: Path) -> Path:
    """Write report.html into the folder of a run; gives its path.

    The settings are read from result.json, so a run of an older version has a page, too.

    Raises:
        RunError: there is no run, it has not ended, or its files are not what a run has written.
    """
    folder = RunFolder(absolute(run), Config())
    result = folder.read_result()
    try:
        texts = _texts(result)
    except _OTHER_SHAPE as error:
        raise RunError(f"{folder.result_path} is not the result of a run ({_said(error)}); restore it") from error
    try:
        pictures = _pictures(folder, result)
    except _OTHER_SHAPE as error:
        names = f"{folder.result_path} or {folder.metrics_path.name}"
        raise RunError(f"{names} is not what a run has written ({_said(error)}); restore it") from error
    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(
        files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    path = folder.path / "report.html"
    write_text(path, template.render(**texts, **pictures, **_diagnosed(folder)))
    return path


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _pictures(folder: RunFolder, result: Mapping[str, Any]) -> dict[str, str | None]:
    """By name: a data URI, or None where the run has nothing to show."""
    accuracy, counts = result["accuracy"], result.get("counts")
    # Numbers where no recall by class is known.
    classes = list(accuracy["per_class"]) or list(map(str, range(result["config"]["model.num-classes"])))
    if counts and None not in counts and not folder.partition_path.exists():
        save_partition(torch.tensor(counts), classes, folder.partition_path)
    cells = result.get("confusion")
    return {
        "accuracies": _svg(accuracies(accuracy, result["method"], result.get("client_names", ()))),
        "partition": _png(folder.partition_path),
        "images": _png(folder.images_path),
        "curves": _svg(curves(_metrics(folder))),
        "confusion": _svg(confusion(cells, classes) if cells else None),
    }


def _diagnosed(folder: RunFolder) -> dict[str, Any]:
    """What `fedmitr diagnose` has left, if it has been run: a picture, and tables."""
    path = folder.path / NAME
    if not path.exists():
        return {"gradients": None, "tables": ()}
    try:
        found = json.loads(read_text(path))
        return {"gradients": _svg(diagnosed(found)), "tables": tables(found)}
    except (OSError, *_OTHER_SHAPE) as error:
        raise RunError(f"cannot read {path} ({_said(error)}); run `fedmitr diagnose {folder.path}` again") from error


def _png(path: Path) -> str | None:
    return _uri("image/png", path.read_bytes()) if path.exists() else None


def _svg(figure: Figure | None) -> str | None:
    return None if figure is None else _uri("image/svg+xml", as_svg(figure).encode())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    if not folder.metrics_path.exists():
        return []
    try:
        lines = read_text(folder.metrics_path).splitlines()
    except OSError as error:
        raise RunError(unread("metrics", folder.metrics_path, error)) from error
    found: list[dict[str, Any]] = []
    for line in lines:
        with suppress(ValueError, RecursionError):  # a line that a killed run has left half written is none
            found.append(json.loads(line))
    return list(filter(None, found))


def _texts(result: Mapping[str, Any]) -> dict[str, Any]:
    config, accuracy, defaults = result["config"], result["accuracy"], Config().to_flat()
    changed = {key: value for key, value in config.items() if key in defaults and value != defaults[key]}
    rounds = config["flower.rounds"] if config["flower.strategy"] != "oneshot" else 1
    known = [value for value in accuracy["local"] if value is not None]
    numbers = [
        ("accuracy of the global model, %", _percent(accuracy["student"])),
        ("recall of the worst class, %", _percent(accuracy.get("worst_class"))),
        ("clients alone, mean, %", _percent(sum(known) / len(known) if known else None)),
        ("ensemble, %", _percent(accuracy["ensemble"])),
        ("synthetic images", str(result["synthetic_images"])),
    ]
    if rounds > 1:
        numbers.append(("rounds", str(rounds)))
    return {
        "title": printable(f"{result['method']} on {data_set(config)}"),
        "about": f"{result['clients']} clients, {skew(config)}, seed {result['seed']}, {model(config)}",
        "numbers": numbers,
        "evaluated": evaluated(result.get("evaluated_on")),
        "recall": [(printable(name), _percent(value)) for name, value in accuracy["per_class"].items()],
        "clients": _client_costs(result),
        "server": _server_costs(result),
        "changed": [(key, toml_value(value), toml_value(defaults[key])) for key, value in changed.items()],
        "settings": [(key, toml_value(value)) for key, value in config.items()],
        "origin": _origin(result),
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _client_costs(result: Mapping[str, Any]) -> Rows:
    lists = (result["bytes_up"], result.get("bytes_down") or [], result.get("client_seconds") or [])
    names = result.get("client_names", ())
    rows: Rows = []
    for client in range(len(result["bytes_up"])):
        up, down, seconds = (each[client] if client < len(each) else None for each in lists)
        name = f"{client}, {names[client]}" if client < len(names) else str(client)
        rows.append((name, _scaled(up, 1e6, 3), _scaled(down, 1e6, 3), _scaled(seconds, 1, 1)))
    return rows


def _server_costs(result: Mapping[str, Any]) -> Rows:
    memory = result.get("peak_memory") or {}
    return [
        *((f"{stage}, s", _scaled(spent, 1, 2)) for stage, spent in result["seconds"].items()),
        ("all without evaluation, s", _scaled(result.get("server_seconds"), 1, 2)),
        ("peak memory of the process, GB", _scaled(memory.get("ram"), 1e9, 2)),
        ("peak memory on the GPU, GB", _scaled(memory.get("gpu"), 1e9, 2)),
    ]


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _origin(result: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    machine = result["machine"]
    hardware = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return [
        ("code", str(result["fingerprint"])),
        ("partition", str(result.get("partition_sha256") or "-")),
        ("machine", hardware),
        ("platform", str(machine.get("platform") or "-")),
        ("versions", versions),
    ]

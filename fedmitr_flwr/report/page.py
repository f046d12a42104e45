"""`fedmitr report`: one self-contained HTML page of one run, from what the run left in its folder."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from ..common.errors import RunError, printable, unread
from ..common.files import absolute, load_tensors, read_text, write_text
from ..config import Config
from ..config.text import toml_value
from ..diagnostics.table import NAME, tables
from ..judge import GLIMPSE
from ..runs.folder import RunFolder
from . import charts
from .figures import partition, samples
from .words import command, data_set, evaluated, model, skew

Rows = list[tuple[str, ...]]

_GAIN = "gain over FedAvg, points"
_MANY = 25  # classes, above which recall is a histogram and the worst ten
_SMALL = 64  # pixels

# What reading a result or a metric of another shape raises: they are JSON, in which anything may stand anywhere.
OTHER_SHAPE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


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
    except OTHER_SHAPE as error:
        raise RunError(f"{folder.result_path} is not the result of a run ({_said(error)}); restore it") from error
    try:
        pictures = _pictures(folder, result)
    except OTHER_SHAPE as error:
        names = f"{folder.result_path} or {folder.metrics_path.name}"
        raise RunError(f"{names} is not what a run has written ({_said(error)}); restore it") from error
    path = folder.path / "report.html"
    write_text(path, template("page.html").render(**texts, **pictures, **_diagnosed(folder), files=_files(folder)))
    return path


def template(name: str) -> Template:
    """One of this package's pages."""
    return Environment(autoescape=True, loader=PackageLoader("fedmitr_flwr", "report")).get_template(name)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _pictures(folder: RunFolder, result: Mapping[str, Any]) -> dict[str, Any]:
    """By name: an element of the page, several, or None where the run has nothing to show."""
    accuracy, counts = result["accuracy"], result.get("counts")
    # Numbers where no recall by class is known.
    classes = list(accuracy["per_class"]) or list(map(str, range(result["config"]["model.num-classes"])))
    cells, teachers, metrics = result.get("confusion"), result.get("teacher_weights"), _metrics(folder)
    names = result.get("client_names", ())
    recall = [value for value in accuracy["per_class"].values() if value is not None]
    bars = "Bars: accuracy of each client's model alone, and of the global model"
    steps = "Lines: losses, or the share of alive patches, by step"
    known = counts if counts and None not in counts else None
    return {
        "accuracies": svg(charts.accuracies(accuracy, result["method"], names), bars),
        "partition": svg(known and partition(known, classes), "Heat map: training images by client and class"),
        "learning": svg(charts.learning(metrics, accuracy), "Line: accuracy of the student by epoch"),
        "weights": svg(teachers and charts.weights(teachers, classes, names), "Heat map: weight by teacher and class"),
        "samples": _samples(folder, result, classes),
        "images": _uri("image/png", folder.images_path.read_bytes()) if folder.images_path.exists() else None,
        "curves": [svg(figure, steps) for figure in charts.curves(metrics)],
        "confusion": svg(cells and charts.confusion(cells, classes), "Heat map: true classes against answers"),
        "recalls": svg(charts.recalls(recall) if len(recall) > _MANY else None, "Histogram: classes by recall"),
    }


def _diagnosed(folder: RunFolder) -> dict[str, Any]:
    """What `fedmitr diagnose` has left, if it has been run: pictures, and tables."""
    path = folder.path / NAME
    if not path.exists():
        return {"gradients": None, "tables": ()}
    what = "Lines: noise of the input gradient by step of inversion, or distance of two students by step"
    try:
        found = json.loads(read_text(path))
        return {"gradients": [svg(figure, what) for figure in charts.diagnosed(found)], "tables": tables(found)}
    except (OSError, *OTHER_SHAPE) as error:
        raise RunError(f"cannot read {path} ({_said(error)}); run `fedmitr diagnose {folder.path}` again") from error


def svg(figure: Figure | None, description: str) -> Markup | None:
    """As an element of a page."""
    return Markup(charts.as_svg(figure, description)) if figure else None


def _samples(folder: RunFolder, result: Mapping[str, Any], classes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Of some synthetic images the class, the image, and the same with halted patches faded; none without the pool."""
    if not folder.pool_path.exists():
        return []
    pool, known = load_tensors(folder.pool_path)[0], Config().to_flat()
    model = Config.from_flat({key: value for key, value in result["config"].items() if key in known}).model
    chosen = samples(pool["images"], pool["alive"], pool["targets"], model, most=24)
    return [(printable(classes[y]), _image(whole), _image(masked)) for y, whole, masked in chosen]


def _image(pixels_HWC: "np.ndarray[Any, Any]") -> str:
    """Small ones as they are, others as JPEG: of images of noise, PNG are large."""
    kind, out = ("png" if len(pixels_HWC) <= _SMALL else "jpeg"), io.BytesIO()
    Image.fromarray(pixels_HWC).save(out, kind, quality=85)
    return _uri(f"image/{kind}", out.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _files(folder: RunFolder) -> list[tuple[str, str]]:
    """What lies beside the page, with its size."""
    paths = (
        folder.model_path,
        folder.model_config_path,
        folder.card_path,
        folder.pool_path,
        folder.path / "config.toml",
        folder.result_path,
        folder.metrics_path,
    )
    return [(path.name, f"{path.stat().st_size / 1e6:.2f} MB") for path in paths if path.exists()]


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
    calibration = result.get("calibration") or {"nll": None, "ece": None}
    numbers = [
        ("accuracy of the global model (student), %", _percent(accuracy["student"])),
        ("one-round FedAvg, %", _percent(accuracy["fedavg"])),
        (_GAIN, gain(accuracy)),
        ("ensemble, %", _percent(accuracy["ensemble"])),
        ("clients alone, mean, %", _percent(sum(known) / len(known) if known else None)),
        ("recall of the worst class, %", _percent(accuracy.get("worst_class"))),
        ("negative log-likelihood (NLL)", _percent(calibration["nll"])),
        ("expected calibration error (ECE), %", _percent(calibration["ece"])),
        ("synthetic images", str(result["synthetic_images"])),
    ]
    if rounds > 1:
        numbers.append(("rounds", str(rounds)))
    return {
        "title": printable(f"{result['method']} on {data_set(config)}"),
        "about": f"{result['clients']} clients, {skew(config)}, seed {result['seed']}, {model(config)}",
        "numbers": [(name, value) for name, value in numbers if value != "-"],
        "gain": _GAIN,
        "evaluated": evaluated(result.get("evaluated_on")),
        "glimpse": GLIMPSE,
        "classes": config["model.num-classes"],
        "guess": f"{math.log(config['model.num-classes']):.1f}",
        "recall": _recall(accuracy["per_class"]),
        "command": command(config),
        "clients": _client_costs(result),
        "server": _server_costs(result),
        "changed": [(key, toml_value(value), toml_value(defaults[key])) for key, value in changed.items()],
        "settings": [(key, toml_value(value)) for key, value in config.items()],
        "origin": _origin(result),
    }


def gain(accuracy: Mapping[str, Any]) -> str:
    """Of the student over FedAvg, in points."""
    student, fedavg = accuracy["student"], accuracy["fedavg"]
    return "-" if None in (student, fedavg) else f"{student - fedavg:+.2f}"


def _recall(per_class: Mapping[str, float | None]) -> Rows:
    """From the worst; classes without images are last."""
    order = sorted(per_class.items(), key=lambda each: math.inf if each[1] is None else each[1])
    return [(printable(name), _percent(value)) for name, value in order]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _client_costs(result: Mapping[str, Any]) -> Rows:
    lists = (result["bytes_up"], result.get("bytes_down") or [], result.get("client_seconds") or [])
    names = result.get("client_names", ())
    rows: Rows = []
    for client in range(len(result["bytes_up"])):
        up, down, seconds = (each[client] if client < len(each) else None for each in lists)
        name = f"{client}, {names[client]}" if client < len(names) else str(client)
        rows.append((name, scaled(up, 1e6, 3), scaled(down, 1e6, 3), scaled(seconds, 1, 1)))
    totals = [sum(value for value in each if value is not None) if any(each) else None for each in lists]
    return [*rows, ("all", *(scaled(*each) for each in zip(totals, (1e6, 1e6, 1), (3, 3, 1), strict=True)))]


def _server_costs(result: Mapping[str, Any]) -> Rows:
    memory = result.get("peak_memory") or {}
    stages, total = result["seconds"], result.get("server_seconds")
    rest = None if total is None else total - sum(spent for name, spent in stages.items() if name != "evaluation")
    return [
        *((f"{stage}, s", scaled(spent, 1, 2)) for stage, spent in stages.items()),
        ("in no stage (loading models, weighing teachers), s", scaled(rest and max(rest, 0.0), 1, 2)),
        ("all without evaluation, s", scaled(total, 1, 2)),
        ("peak memory of the process, GB", scaled(memory.get("ram"), 1e9, 2)),
        ("peak memory on the GPU, GB", scaled(memory.get("gpu"), 1e9, 2)),
    ]


def scaled(value: float | None, unit: float, digits: int) -> str:
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

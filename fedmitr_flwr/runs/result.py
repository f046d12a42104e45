"""result.json: everything one must know to trust and to repeat a number, and the table made from it."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ..common.errors import printable
from ..common.fingerprint import fingerprint, of_method
from ..common.provenance import machine, versions
from ..config import Config, DataConfig

_SEAL = "checksum"  # of all else in the file; files of 0.1.0 have none
_WIDTH = 96  # of the tables, in characters
_NUMBERS = (int, float)


def build(
    *,
    config: Config,
    device: str,
    bytes_up: Sequence[int | None],
    seconds: Mapping[str, float],
    student: float | None,
    fedavg: float | None = None,
    ensemble: float | None = None,
    local: Sequence[float | None] = (),
    per_class: Mapping[str, float] | None = None,
    counts: Sequence[Sequence[int] | None] | None = None,
    partition_sha256: str | None = None,
    bytes_down: Sequence[int | None] | None = None,
    client_seconds: Sequence[float | None] | None = None,
    server_seconds: float | None = None,
    peak_memory: Mapping[str, int | None] | None = None,
    confusion: Sequence[Sequence[int]] = (),
    synthetic_images: int = 0,
    **more: object,
) -> dict[str, Any]:
    """The contents of result.json, from parts that are computed already, where None is: not known, or there is none.

    Accuracies are in percent: of the resulting model after the last epoch (`student`; `per_class` is its recall by
    class name, NaN where a class has no test image), of the weighted mean of the uploads (`fedavg`), of all uploads
    together (`ensemble`), and of each upload alone (`local`). What is of the clients is in their order, as is `counts`,
    their images by class. `confusion` has images by true class (row) and answer (column), in the order of `per_class`.

    Bytes are of arrays as they were sent, seconds by stage; of pieces that an earlier start made, what they took then.
    `server_seconds` are without evaluation, and `peak_memory` (`compute.peak_memory`) is of the process that did it.
    `partition_sha256` is a hash of who holds which image. What else a method reports is kept under its own name.
    """
    recall = {name: _percent(value) for name, value in (per_class or {}).items()}
    return {
        "method": config.method,
        "seed": config.seed,
        "clients": config.partition.clients,
        "accuracy": {
            "student": _percent(student),
            "fedavg": _percent(fedavg),
            "ensemble": _percent(ensemble),
            "local": [_percent(value) for value in local],
            "worst_class": min((value for value in recall.values() if value is not None), default=None),
            "per_class": recall,
        },
        "confusion": [list(map(int, row)) for row in confusion],
        "seconds": {stage: _seconds(spent) for stage, spent in seconds.items()},
        "bytes_up": list(bytes_up),
        "bytes_down": None if bytes_down is None else list(bytes_down),
        "client_seconds": None if client_seconds is None else [_seconds(spent) for spent in client_seconds],
        "server_seconds": _seconds(server_seconds),
        "peak_memory": None if peak_memory is None else dict(peak_memory),
        "synthetic_images": synthetic_images,
        **more,
        "counts": None if counts is None else [row and list(map(int, row)) for row in counts],
        "partition_sha256": partition_sha256,
        "fingerprint": fingerprint(),
        "core": of_method(config.method),
        "versions": versions(),
        "machine": machine(device),
        "config": config.to_flat(),
    }


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result as it goes to the file, with a checksum."""
    return {**result, _SEAL: _checksum(result)}


def unsealed(found: Any) -> dict[str, Any]:
    """The result as it was read from the file.

    Raises:
        ValueError: it was altered, or is not the result of a run.
    """
    if not isinstance(found, dict):
        raise ValueError("it is no table")
    result = {key: value for key, value in found.items() if key != _SEAL}
    if _SEAL in found and found[_SEAL] != _checksum(result):
        raise ValueError("it was altered after it was written (its checksum differs)")
    if wrong := [key for key, has in _SHAPE.items() if not has(result.get(key))]:
        raise ValueError(f"its {wrong[0]!r} is not that of a run")
    return result


def _checksum(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _is_accuracy(value: object) -> bool:
    """What `accuracy` is: percents by model, None where there is none."""
    if not isinstance(value, dict) or not {"student", "fedavg", "ensemble", "local", "per_class"} <= value.keys():
        return False
    local, per_class = value["local"], value["per_class"]
    if not isinstance(local, list) or not isinstance(per_class, dict):
        return False
    numbers = [value["student"], value["fedavg"], value["ensemble"], *local, *per_class.values()]
    return all(number is None or type(number) in _NUMBERS for number in numbers)


def _holds(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(type(each) in kinds for each in value.values())


# What every result has; parts that only some have are checked where they are shown.
_SHAPE: Mapping[str, Callable[[object], bool]] = {
    "method": lambda value: isinstance(value, str),
    "accuracy": _is_accuracy,
    "seconds": lambda value: _holds(value, _NUMBERS),
    "config": lambda value: bool(value) and _holds(value, (bool, str, *_NUMBERS)),
}


def on_server(data: DataConfig, images: int) -> dict[str, object]:
    """`evaluated_on`: which images the server's accuracies are of."""
    return {"where": "server", "split": "validation" if data.validation else "test", "images": images}


def _percent(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 2)


def _seconds(spent: float | None) -> float | None:
    return None if spent is None else round(float(spent), 3)


def ending(result: Mapping[str, Any], folder: Path) -> str:
    """What a run ends with: the table, the run folder and what to do next."""
    return f"\n{accuracy_table(result)}\n\nrun folder: {folder}\nnext: fedmitr report {folder}"


def accuracy_table(result: Mapping[str, Any]) -> str:
    """How good each model is and what the student gains, then what it cost; plain text, however many clients."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    accuracy = result["accuracy"]
    student, fedavg, ensemble = accuracy["student"], accuracy["fedavg"], accuracy["ensemble"]
    known = [value for value in accuracy["local"] if value is not None]
    gains = [] if None in (student, fedavg) else [f"{student - fedavg:+.2f} over fedavg"]
    gains += [f"{100 * student / ensemble:.0f} % of the ensemble"] if student is not None and ensemble else []
    rows = [
        ("fedavg, one round", fedavg, ""),
        ("ensemble of all clients", ensemble, ""),
        (f"{result['method']} (student)", student, ", ".join(gains)),
    ]
    if known:
        alone = f"{min(known):.2f} to {max(known):.2f}" if len(known) > 1 else ""
        rows.insert(0, ("clients alone, mean", sum(known) / len(known), alone))
    if worst := [name for name, value in accuracy["per_class"].items() if value == accuracy.get("worst_class")]:
        rows.append(("its worst class", accuracy["worst_class"], printable(worst[0])))
    table = Table("model", Column("accuracy %", justify="right"), "", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, value, remark in rows:
        table.add_row(Text(name), "-" if value is None else f"{value:.2f}", Text(remark))
    console = Console(file=StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    measured = result.get("evaluated_on") or {}
    if measured.get("split") == "validation":
        lines.append(f"on {measured['images']} validation images; the test images were not read")
    sent = [size / 1e6 for size in result.get("bytes_up") or () if size]
    if sent:
        lines += ["", f"upload: {sum(sent) / len(sent):.2f} MB per client, {sum(sent):.2f} MB in all"]
    spent = {"clients": sum(filter(None, result.get("client_seconds") or ())), **result.get("seconds", {})}
    stages = [f"{stage} {seconds:.1f}" for stage, seconds in spent.items() if seconds]
    return "\n".join([*lines, *(["seconds: " + ", ".join(stages)] if stages else [])])

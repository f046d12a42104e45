"""The studies of docs/results.md and the table of README.md, from committed files of 0.1.0's scripts.

What can be run today is configs/bench/seeds.toml and digits.toml.

A study is one setting on several seeds: each row is one seed, and one pair of inversion and relabelling.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import benches
from markup import seeds

from fedmitr_flwr.bench.markup import spread, table
from fedmitr_flwr.bench.results import load
from fedmitr_flwr.report.words import data_set, measure, model, skew

Row = Mapping[str, Any]
Study = Mapping[str, Any]

SEEDS = "seeds"  # the bench of the studies' settings, with today's code
NOTHING = "No results are committed yet."
NAMES = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
CELL = ("inversion.mode", "relabel.mode")
STUDENT = ("Ensemble", "FedMITR", "% of the ensemble", "Server, s")
GLANCE = ("Setting, 5 clients", "Clients alone", "FedAvg", "DENSE", "FedMITR", "% of its ensemble", "`lda`")


def student(row: Row) -> float:
    return float(row["accuracy"]["student"])


def fedavg(row: Row) -> float:
    return float(row["accuracy"]["fedavg"])


def ensemble(row: Row) -> float:
    return float(row["accuracy"]["ensemble"])


def alone(row: Row) -> float:
    """Mean over the clients that have a model."""
    return float(mean(value for value in row["accuracy"]["local"] if value is not None))


def reached(row: Row) -> float:
    """Percent of the ensemble's accuracy, of one seed."""
    return 100 * student(row) / ensemble(row)


def server_seconds(row: Row) -> float:
    """All stages of the server phase, evaluation too."""
    return float(sum(row["seconds"].values()))


def read(results: Path) -> list[Study]:
    """All committed studies; rows of one seed must share their uploads."""
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            _require_same_uploads(path.name, content)
        except KeyError as error:
            raise ValueError(f"{path}: no {error.args[0]!r}; is it the file of a study?") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); make it again") from error
        found.append(content)
    return found


def _require_same_uploads(name: str, content: Study) -> None:
    _ = content["config"], content["command"]
    seeds = {row["seed"]: row for row in content["rows"]}
    for row in content["rows"]:
        if any(value(row) != value(seeds[row["seed"]]) for value in (alone, fedavg)):
            raise ValueError(f"{name}: the cells of seed {row['seed']} are not of the same uploads")


def setting(config: Mapping[str, Any]) -> str:
    """The data, how many images, the partition and, where it is not the small one, the model."""
    name, limit = data_set(config), config["data.train-limit"]
    words = [NAMES.get(name, name), *([f"{limit:,} images"] if limit else []), skew(config)]
    words += [model(config)] if config["model.name"] != "small" else []
    return ", ".join(words)


def default_rows(content: Study) -> list[Row]:
    """Those of the setting's own pair of inversion and relabelling."""
    return [row for row in content["rows"] if all(row[key] == content["config"][key] for key in CELL)]


def block(results: Path) -> str:
    """All studies: one line each, the weights of the ensemble, the grids, and where they come from."""
    studies = read(results)
    if not studies:
        return NOTHING
    every = seeds(row for content in studies for row in content["rows"])
    kinds = " and ".join(dict.fromkeys(measure(content["config"]).lower() for content in studies))
    parts = [
        f"Seeds {every}; {kinds} in percent, last epoch, mean ± sample standard deviation (n).",
        "\n".join(_overview(studies)),
        *_weights(studies),
        *_grids(studies),
        "Commands: " + "; ".join(f"`{content['command']}`" for content in studies) + ".",
        *benches.origins(studies),
    ]
    return "\n\n".join(parts)


def _overview(studies: Sequence[Study]) -> list[str]:
    head = ("Setting", "Clients alone", "FedAvg", *STUDENT)
    lines = []
    for content in studies:
        rows = default_rows(content)
        lines.append([setting(content["config"]), *_spreads(rows, alone, fedavg), *_student(rows)])
    return table(head, lines)


def _student(rows: Sequence[Row]) -> list[str]:
    return [*_spreads(rows, ensemble, student, reached), spread(map(server_seconds, rows), 0)]


def _spreads(rows: Sequence[Row], *values: Callable[[Row], float]) -> list[str]:
    return [spread(map(value, rows)) for value in values]


def _weights(studies: Sequence[Study]) -> list[str]:
    """Ensembles by other weights, where a study has them."""
    shown = [content for content in studies if content["rows"][0].get("ensembles")]
    if not shown:
        return []
    names = list(dict.fromkeys(name for content in shown for name in content["rows"][0]["ensembles"]))
    lines = [
        [setting(content["config"])]
        + [spread(row["ensembles"].get(name) for row in default_rows(content)) for name in names]
        for content in shown
    ]
    return ["The same ensembles by other weights:", "\n".join(table(["Setting", *names], lines))]


def _grids(studies: Sequence[Study]) -> list[str]:
    """Every pair of inversion and relabelling, where a study has more than one."""
    parts = []
    for content in studies:
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in content["rows"]:
            found.setdefault(tuple(row[key] for key in CELL), []).append(row)
        if len(found) > 1:
            default = tuple(content["config"][key] for key in CELL)
            lines = [
                [inversion, relabelling + " (default)" * ((inversion, relabelling) == default), *_student(rows)]
                for (inversion, relabelling), rows in found.items()
            ]
            parts.append(f"Inversion and relabelling on {setting(content['config'])}, identical uploads:")
            parts.append("\n".join(table(["Inversion", "Relabelling", *STUDENT], lines)))
    return parts


def glance(results: Path) -> str:
    """README.md: a line for each setting that is not IID in a study; the bench of the same settings is newer."""
    found: dict[str, list[str]] = {}
    for content in read(results):
        if content["config"]["partition.scheme"] != "iid":
            rows = default_rows(content)
            own = [*_spreads(rows, alone, fedavg), "-", *_spreads(rows, student, reached), "-"]
            found[setting(content["config"])] = own
    again: dict[str, list[str]] = {}
    for bench in (SEEDS, benches.HEADLINE):
        path = results / "bench" / bench / "results.jsonl"
        places = _places(load(path).entries) if path.is_file() else {}
        again |= places if bench == SEEDS else {}
        found |= places
    if not found:
        return NOTHING
    said = "Test accuracy in percent after the last epoch, mean ± sample standard deviation (seeds), one round. "
    said += "Rows of 3,000 images have half of the usual budget. -: not measured there. Measured with 0.1.0"
    said += f", but for {'; '.join(again)}." if again else "."
    return "\n".join([said, "", *table(GLANCE, [[name, *own] for name, own in found.items()])])


def _places(entries: Sequence[Row]) -> dict[str, list[str]]:
    """Those of the bench's first number of clients."""
    clients = entries[0]["bench"]["clients"]
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for entry in entries:
        place = entry["bench"]
        if place["clients"] == clients:
            found.setdefault((place["data"], place["partition"]), {}).setdefault(place["label"], []).append(entry)
    lines = {}
    for here in found.values():
        if ours := here.get("fedmitr"):
            named = {**ours[0]["config"], "data.path": ours[0]["bench"]["data"]}  # a bench's settings have no paths
            dense, lda = (_spreads(here.get(label, []), student) for label in ("dense", "lda"))
            own = [*_spreads(ours, alone, fedavg), *dense, *_spreads(ours, student, reached), *lda]
            lines[setting(named)] = own
    return lines

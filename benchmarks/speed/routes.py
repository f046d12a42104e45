"""The routing tables of docs/performance.md, from committed files; today's study is configs/bench/routing.toml."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from markup import provenance, sections, seeds

from fedmitr_flwr.bench.markup import table

HEAD = ("Weights", "Threshold", "Teachers asked, %", "Student", "Ensemble", "Inversion, s")

Row = Mapping[str, Any]


def block(results: Path) -> str:
    """The Markdown of all files of a folder."""
    return sections(results, section, "routing.py")


def section(content: Mapping[str, Any]) -> list[str]:
    """One file: its arms, and where they come from."""
    rows, config = content["rows"], content["config"]
    return [
        f"{config['data.source']}, Dirichlet {config['partition.alpha']}, {config['partition.clients']} clients, seeds "
        f"{seeds(rows)}; mean ± sample standard deviation. All lines of a seed are of the same uploads.",
        "",
        *arms(rows),
        "",
        *provenance(content),
    ]


def arms(rows: Iterable[Row]) -> list[str]:
    """The lines of a table with one line per arm, over its seeds."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["ensemble.weights"], row["inversion.route"]), []).append(row)
    return table(HEAD, [[weights, f"{threshold:g}", *figures(same)] for (weights, threshold), same in found.items()])


def figures(rows: Sequence[Row]) -> list[str]:
    columns = (
        [100 * row["teachers_asked"] for row in rows],
        *([row["accuracy"][model] for row in rows] for model in ("student", "ensemble")),
        [row["seconds"]["inversion"] for row in rows],
    )
    return [f"{mean(each):.1f}" + (f" ± {stdev(each):.1f}" if len(each) > 1 else "") for each in columns]

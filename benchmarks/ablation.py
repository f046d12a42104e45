"""The ablations of docs/results.md, from committed files: one change at a time, on identical uploads of each seed.

They are of 0.1.0, some of whose settings are gone; configs/bench/ablation.toml is what can be run today.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from markup import provenance, sections, seeds

from fedmitr_flwr.bench.markup import spread, table
from fedmitr_flwr.report.words import data_set, measure, model, skew

Row = Mapping[str, Any]

HEAD = ("Changed", "Student", "Difference", "Ensemble", "FedAvg", "Agreement", "Server, s")
UNCHANGED = "unchanged"


def named(changes: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {str(value).lower()}" for key, value in changes.items()) or UNCHANGED


def block(results: Path) -> str:
    """The Markdown of all files of a folder."""
    return sections(results, section, "ablation.py")


def section(content: Mapping[str, Any]) -> list[str]:
    """One file: a table with a line above each part, and where it comes from."""
    rows, config = content["rows"], content["config"]
    return [
        f"### Ablation: {data_set(config)}, {skew(config)}, {config['partition.clients']} clients, {model(config)}",
        "",
        f"Seeds {seeds(rows)}; {measure(config).lower()} in percent, last epoch. Student, and difference from the "
        "unchanged student seed by seed: mean ± sample standard deviation (n). The other columns are means.",
        "",
        *table(HEAD, cells(rows)),
        "",
        *provenance(content),
    ]


def cells(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each change, over its seeds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(named(row["changes"]), []).append(row)
    default = {row["seed"]: row["accuracy"]["student"] for row in found[UNCHANGED]}
    table_lines: list[list[str]] = []
    part = None
    for name, same in found.items():
        if name != UNCHANGED and same[0]["part"] != part:
            part = same[0]["part"]
            table_lines.append([f"*{part}*", *[""] * (len(HEAD) - 1)])
        table_lines.append(
            [
                f"`{name}`",
                spread(row["accuracy"]["student"] for row in same),
                spread(row["accuracy"]["student"] - default[row["seed"]] for row in same),
                *(f"{mean(row['accuracy'][key] for row in same):.1f}" for key in ("ensemble", "fedavg")),
                f"{mean(row['agreement'] for row in same):.1f}",
                f"{mean(sum(row['seconds'].values()) for row in same):.0f}",
            ]
        )
    return table_lines

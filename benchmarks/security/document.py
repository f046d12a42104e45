"""The tables of docs/security.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markup import provenance, sections

from fedmitr_flwr.bench.markup import spread, table

Row = Mapping[str, Any]

DEFENCES = {
    "fedavg": "FedAvg",
    "fedmedian": "FedMedian",
    "krum": "Krum",
    "ensemble plain": "Ensemble",
    "ensemble exclude": "Ensemble, screened",
    "ensemble trim": "Ensemble, trimmed",
    "student plain": "Student",
    "student exclude": "Student, screened",
    "student trim": "Student, trimmed",
}
BUDGETS = ("Local", "FedAvg", "Ensemble", "Student")


def hostile(results: Path) -> str:
    return sections(results, _hostile, "hostile.py")


def privacy(results: Path) -> str:
    return sections(results, _privacy, "privacy.py")


def _hostile(content: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Row] = content["rows"]
    cells = list(dict.fromkeys((row["attack"], row["hostile"]) for row in rows))
    lines = []
    for attack, number in cells:
        same = [row for row in rows if (row["attack"], row["hostile"]) == (attack, number)]
        name = f"{number} {attack}" if number else "none"
        lines.append(
            [name, *(spread(row["accuracy"][each] for row in same) for each in DEFENCES), _found(same, number)]
        )
    return [
        f"Seeds {_seeds(rows)}; test accuracy in percent, mean ± sample standard deviation (n). The last column "
        "counts, over all seeds, the hostile clients that screening left out, and the honest ones.",
        "",
        *table(["Hostile of 10", *DEFENCES.values(), "Left out: hostile, honest"], lines),
        "",
        *provenance(content),
    ]


def _found(rows: Iterable[Row], hostile: int) -> str:
    """The hostile are the first clients."""
    excluded = [client for row in rows for client in row["excluded"]]
    total = hostile * len(list(rows))
    guilty = sum(client < hostile for client in excluded)
    return f"{guilty} of {total}, {len(excluded) - guilty}"


def _privacy(content: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Row] = content["rows"]
    lines = []
    for budget in dict.fromkeys(row["epsilon"] for row in rows):
        same = [row for row in rows if row["epsilon"] == budget]
        spent = max(row["spent"] for row in same) if budget else 0.0
        name = f"{budget:g} (at most {spent:.2f} spent)" if budget else "no noise"
        lines.append([name, *(spread(row["accuracy"][each.lower()] for row in same) for each in BUDGETS)])
    return [
        f"Seeds {_seeds(rows)}; test accuracy in percent, mean ± sample standard deviation (n); δ = "
        f"{content['config']['privacy.delta']:g}.",
        "",
        *table(["ε of each client", "Clients alone, mean", "One-round FedAvg", "Ensemble", "Student"], lines),
        "",
        *provenance(content),
    ]


def _seeds(rows: Iterable[Row]) -> str:
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))

"""The tables of docs/security.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markup import provenance, sections, seeds

from fedmitr_flwr.bench.markup import spread, table

Row = Mapping[str, Any]

DEFENCES = {
    "fedavg": "FedAvg",
    "fedmedian": "FedMedian",
    "krum": "Krum",
    "ensemble plain": "Ensemble",
    "ensemble clear": "Ensemble, `clear`",
    "ensemble exclude": "Ensemble, `exclude`",
    "ensemble trim": "Ensemble, trimmed",
    "student plain": "Student",
    "student clear": "Student, `clear`",
    "student exclude": "Student, `exclude`",
    "student trim": "Student, trimmed",
}
OF_STATISTICS = {
    f"{name} {screening}": f"{title}{', `clear`' * (screening == 'clear')}"
    for name, title in (("lda", "LDA"), ("ridge", "Ridge"))
    for screening in ("plain", "clear")
}
LIE = "statistics "  # before the name of an attack on these
BUDGETS = ("Local", "FedAvg", "Ensemble", "Student")
RIGHT = ("own", "others")
OF_UPLOADS = {"loss": "Loss", "lira": "LiRA", "sums": "Sums"}
OF_RUNS = {"loss": "Student's loss", "pixels": "Nearest image: pixels", "features": "Nearest image: features"}


def hostile(results: Path) -> str:
    return sections(results, _hostile, "hostile.py")


def privacy(results: Path) -> str:
    return sections(results, _privacy, "privacy.py")


def inference(results: Path) -> str:
    return sections(results, _inference, "inference.py")


def _hostile(content: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Row] = content["rows"]
    lines = [
        f"Seeds {seeds(rows)}; test accuracy in percent, mean ± sample standard deviation (n). The last column "
        "counts, over all seeds, the hostile clients that screening left out, and the honest ones.",
        "",
    ]
    of_statistics = [row for row in rows if row["attack"].startswith(LIE)]
    of_weights = [row for row in rows if not row["attack"].startswith(LIE)]
    for some, columns in ((of_weights, DEFENCES), (of_statistics, OF_STATISTICS)):
        if some:
            lines += [*_attacks(some, {key: title for key, title in columns.items() if key in some[0]["accuracy"]}), ""]
    return [*lines, *provenance(content)]


def _attacks(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    lines = []
    for attack, number in dict.fromkeys((row["attack"], row["hostile"]) for row in rows):
        same = [row for row in rows if (row["attack"], row["hostile"]) == (attack, number)]
        name = f"{number} {attack.removeprefix(LIE)}" if number else "none"
        lines.append([name, *(spread(row["accuracy"][each] for row in same) for each in columns), _found(same, number)])
    return table(["Hostile of 10", *columns.values(), "Left out: hostile, honest"], lines)


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
        f"Seeds {seeds(rows)}; test accuracy in percent, mean ± sample standard deviation (n); δ = "
        f"{content['config']['privacy.delta']:g}.",
        "",
        *table(["ε of each client", "Clients alone, mean", "One-round FedAvg", "Ensemble", "Student"], lines),
        "",
        *provenance(content),
    ]


def _inference(content: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Row] = content["rows"]
    of_runs = "inversion" in rows[0]
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["inversion"] if of_runs else row["images"], row["epsilon"]), []).append(row)
    lines = []
    for (first, epsilon), same in cells.items():
        line = [str(first), f"{epsilon:g}" if epsilon else "-", *(spread(row[each] for row in same) for each in RIGHT)]
        for attack in OF_RUNS if of_runs else OF_UPLOADS:
            line.append(_power([row[attack] for row in same if attack in row]))
        if of_runs:
            line += [spread(row[kind]["returned"] for row in same) for kind in ("pixels", "features")]
        lines.append(line)
    head = ["Inversion" if of_runs else "Images of the client", "ε", "Right on its images", "on others"]
    head += [*OF_RUNS.values(), "Back: pixels", "features"] if of_runs else OF_UPLOADS.values()
    return [f"Seeds {seeds(rows)}.", "", *table(head, lines), "", *provenance(content)]


def _power(found: Sequence[Row]) -> str:
    """AUC, and how many members are found where one in a hundred others is called one, in percent."""
    if not found:
        return "-"
    return f"{spread(each['auc'] for each in found)}; {spread(each['found'] for each in found)}"

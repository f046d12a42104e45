"""The tables of a bench: Markdown for people, LaTeX for papers, CSV for everything else."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..report.words import measure, model
from .markup import figure, origin, spread, table, tabular
from .results import Results
from .rows import Place, Row, p_value, places, reference_of, rows
from .stats import difference, holm

LEVEL = 0.05
KINDS = {"one-shot": "One-shot", "flower": "Flower's own", "reference": "For reference"}
COSTS = {
    "Up, MB": ("bytes_up", 1e6),
    "Down, MB": ("bytes_down", 1e6),
    "Client, s": ("client_seconds", 1.0),
    "Server, s": ("server_seconds", 1.0),
    "Peak RAM, GB": ("ram", 1e9),
    "Peak GPU, GB": ("gpu", 1e9),
}
COLUMNS = ["data", "clients", "partition", "method", "rounds", "kind", "n", "seeds"]
COLUMNS += ["accuracy_mean", "accuracy_std", "p_against_reference", "worst_class_mean", "worst_class_std"]
COLUMNS += ["bytes_up", "bytes_down", "client_seconds", "server_seconds", "peak_ram", "peak_gpu"]


def markdown(results: Results) -> str:
    """All tables: one section for each data set and number of clients."""
    found = rows(results)
    lines = [f"## {results.name}", ""]
    for data, clients in dict.fromkeys((place.data, place.clients) for place in places(found)):
        own = [row for row in found if (row.place.data, row.place.clients) == (data, clients)]
        lines += [f"### {title(own[0])}", "", *accuracy(own, results.reference), ""]
        lines += [*_worst(own), "", *_costs(own), ""]
    lines += _tuned(results)
    if by_label := Counter(place["label"] for place in results.missing):
        by_method = ", ".join(f"`{label}` {count}" for label, count in by_label.items())
        lines += [f"Cells without a result: {len(results.missing)} ({by_method}).", ""]
    for made_by in dict.fromkeys(map(origin, results.entries)):  # each machine and code that results are from
        lines += [made_by, ""]
    return "\n".join(lines).rstrip() + "\n"


def latex(results: Results) -> str:
    """The accuracies and the worst recall, a `tabular` each."""
    found, lines = rows(results), [r"% needs \usepackage{booktabs,amssymb}"]
    for data, clients in dict.fromkeys((place.data, place.clients) for place in places(found)):
        own = [row for row in found if (row.place.data, row.place.clients) == (data, clients)]
        for part in (accuracy(own, results.reference), _worst(own)):
            lines += ["", f"% {title(own[0])}. {part[0]}", *tabular(part[2:])]
    return "\n".join(lines) + "\n"


def title(row: Row) -> str:
    return f"{row.place.data}, {row.place.clients} clients, {model(row.entries[0]['config'])}"


def accuracy(found: Sequence[Row], reference: str) -> list[str]:
    """The table of accuracies, methods by place, with what its marks mean."""
    columns = places(found)
    best = {place: max(_in_race(found, place), key=lambda row: row.accuracy.mean, default=None) for place in columns}
    against = {place: reference_of(found, place, reference) for place in columns}

    tests = [(row, p) for row in found if (p := p_value(row, against[row.place])) is not None]
    corrected = {id(row): p for (row, _), p in zip(tests, holm([p for _, p in tests]), strict=True)}

    def cell(row: Row) -> str:
        text = spread(row.accuracy.by_seed.values()) + _mark(row, against[row.place], corrected.get(id(row)))
        return f"**{text}**" if row is best[row.place] else text

    marks = (
        f" ▲ better, ▼ worse than `{reference}` in a paired t-test over the seeds, p < {LEVEL} after Holm's "
        f"correction for the number of tests of this table, {len(tests)}."
    )
    return [
        f"{measure(found[0].entries[0]['config'])} in percent, last epoch: mean ± sample standard deviation "
        f"(seeds). Best in bold, without the lines for reference.{marks if tests else ''}",
        "",
        *_by_place(found, columns, cell),
    ]


def _worst(found: Sequence[Row]) -> list[str]:
    known = [row for row in found if row.worst is not None]
    return [
        "Recall of the worst class, in percent: mean ± sample standard deviation (seeds).",
        "",
        *_by_place(known, places(found), lambda row: spread(row.worst.by_seed.values() if row.worst else ())),
    ]


def _by_place(found: Sequence[Row], columns: Sequence[Place], cell: Callable[[Row], str]) -> list[str]:
    """Methods by place, with a line above each kind of methods."""
    lines = []
    for kind, name in KINDS.items():
        methods = dict.fromkeys(row.name for row in found if row.kind == kind)
        if methods:
            lines.append([f"*{name}*", *[""] * len(columns)])
        for method in methods:
            at = {row.place: cell(row) for row in found if row.name == method and row.kind == kind}
            lines.append([f"`{method}`", *(at.get(place, "-") for place in columns)])
    return table(["Method", *(place.partition for place in columns)], lines)


def _in_race(found: Sequence[Row], place: Place) -> list[Row]:
    """Of those that have run on the most seeds: others are means over other partitions."""
    racing = [row for row in found if row.place == place and row.kind != "reference"]
    most = max((row.accuracy.n for row in racing), default=0)
    return [row for row in racing if row.accuracy.n == most]


def _mark(row: Row, reference: Row | None, p: float | None) -> str:
    if p is None or p >= LEVEL or reference is None:
        return ""
    return " ▲" if difference(row.accuracy, reference.accuracy) > 0 else " ▼"


def _costs(found: Sequence[Row]) -> list[str]:
    """Means over all places and seeds."""
    shown = {name: how for name, how in COSTS.items() if any(row.cost(how[0]) is not None for row in found)}
    lines = []
    for method in dict.fromkeys(row.name for row in found if row.kind != "reference" or row.entries[0]["method"]):
        own = [row for row in found if row.name == method]
        cells = []
        for key, unit in shown.values():
            known = [value for row in own if (value := row.cost(key)) is not None]
            cells.append(figure(sum(known) / len(known) / unit) if known else "-")
        lines.append([f"`{method}`", *cells])
    return [
        "What it costs: bytes and seconds of one client, all rounds together; seconds and memory of the server without "
        "evaluation. Means over all columns and seeds.",
        "",
        *table(["Method", *shown], lines),
    ]


def _tuned(results: Results) -> list[str]:
    lines = {}
    for entry in results.entries:
        place = entry["bench"]
        if place["tuned"]:
            tried = ", ".join(_trial(trial) for trial in place["tuned"]["tried"])
            chosen = _settings(place["tuned"]["chosen"]) or "all failed"
            where = f"{place['tuned']['on']}, seed {place['tuned']['seed']}"
            method = [place["data"], f"`{place['label']}`", str(place["rounds"])]
            lines[place["data"], place["label"], place["rounds"]] = [*method, chosen, tried, where]
    if not lines:
        return []
    head = ["Data", "Method", "Rounds", "Chosen", "Tried (validation accuracy, %)", "On"]
    return ["### Settings chosen on validation images", "", *table(head, lines.values()), ""]


def _trial(trial: Mapping[str, Any]) -> str:
    accuracy = trial["accuracy"]
    return f"{_settings(trial)} ({'failed' if accuracy is None else f'{accuracy:.1f}'})"


def _settings(flat: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in flat.items() if key != "accuracy")


def as_csv(results: Results) -> str:
    """One line for each method and place; bytes, seconds and percent as they are."""
    found = rows(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in found:
        p = p_value(row, reference_of(found, row.place, results.reference))
        costs = [row.cost(key) for key, _ in COSTS.values()]
        worst = (row.worst.mean, row.worst.std) if row.worst else (None, None)
        seeds = " ".join(map(str, sorted(row.accuracy.by_seed)))
        numbers = (row.accuracy.mean, row.accuracy.std, p, *worst, *costs)
        about = (*row.place, row.label, row.rounds, row.kind, row.accuracy.n, seeds)
        writer.writerow([*about, *("" if number is None else f"{number:.6g}" for number in numbers)])
    return text.getvalue()

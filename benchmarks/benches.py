"""What docs/results.md says of the benches that are committed.

Each is a folder of benchmarks/results/bench with the results.jsonl and the figures that `fedmitr bench` has written.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedmitr_flwr.bench.markup import figure, origin
from fedmitr_flwr.bench.results import Entry, load
from fedmitr_flwr.bench.rows import Row, places, rows
from fedmitr_flwr.bench.table import accuracy, title

NOTHING = "No results are committed yet."
HEADLINE = "cpu"
TRIAL = "smoke"  # every method once, on a budget by which none can be judged
FOLDER = "../benchmarks/results/bench"
COSTS = ("server_seconds", "bytes_up")


def block(results: Path) -> str:
    """All benches but the trial, the headline first: accuracies, costs, and a figure of both."""
    found = [path for path in sorted(results.glob("*/results.jsonl")) if path.parent.name != TRIAL]
    texts = [section(path) for path in sorted(found, key=lambda path: path.parent.name != HEADLINE)]
    return "\n\n".join(texts) or NOTHING


def section(path: Path) -> str:
    """One bench, for its first number of clients."""
    bench, name = load(path), path.parent.name
    found = rows(bench)
    first = places(found)[0]
    own = [row for row in found if row.place[:2] == first[:2]]
    drawn = sorted((path.parent / "figures").glob(f"*-K{first.clients}-accuracy.png"))
    parts = [
        f"### {title(own[0])}",
        "\n".join(accuracy(own, bench.reference)),
        costs(own),
        *chosen(bench.entries),
    ]
    parts += [f"![{name}: {each.stem.replace('-', ' ')}]({FOLDER}/{name}/figures/{each.name})" for each in drawn]
    return "\n\n".join([*parts, f"Command: `fedmitr bench configs/bench/{name}.toml`", *origins(bench.entries)])


def costs(found: Sequence[Row]) -> str:
    """Means over all partitions and seeds."""
    told = []
    for method in dict.fromkeys(row.name for row in found if row.entries[0]["method"]):
        own = [row for row in found if row.name == method]
        seconds, sent = ([value for row in own if (value := row.cost(key)) is not None] for key in COSTS)
        told.append(f"`{method}` {figure(mean(seconds))}" + (f" ({figure(mean(sent) / 1e6)})" if sent else ""))
    said = "Server seconds without evaluation (MB up per client, all rounds), means over partitions and seeds"
    return f"{said}: {', '.join(told)}."


def chosen(entries: Iterable[Entry]) -> list[str]:
    """Settings of Flower's strategies, chosen on validation images of another seed."""
    found = {}
    for entry in entries:
        told = entry["bench"]
        if told["tuned"]:
            settings = ", ".join(f"{key} = {value}" for key, value in told["tuned"]["chosen"].items())
            found[f"`{told['label']}`, {told['rounds']} round{'s' * (told['rounds'] > 1)}: {settings}"] = told["tuned"][
                "seed"
            ]
    if not found:
        return []
    seeds = ", ".join(map(str, dict.fromkeys(found.values())))
    return [f"Chosen on validation images of seed {seeds}: {'; '.join(found)}."]


def origins(contents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each machine once, with every code and note of its results."""
    found: dict[str, list[dict[str, None]]] = {}
    for content in contents:
        machine = origin({**content, "note": ""}).partition(" Code ")[0]
        codes, notes = found.setdefault(machine, [{}, {}])
        codes[content["fingerprint"]] = None
        notes.update(dict.fromkeys(re.findall(r"\S.*?\.(?=\s|$)", content.get("note", ""))))
    return [
        f"{machine} Code {', '.join(codes)}. {' '.join(notes)}".rstrip() for machine, (codes, notes) in found.items()
    ]

"""Rewrite the results in README.md and docs/ from committed files, so that no number is typed by hand.

    python benchmarks/table.py            rewrites the blocks between <!-- results --> and <!-- /results -->, and so on
    python benchmarks/table.py --check    exit status 1 if a block is not what the files say

The results are benchmarks/results/*.json, files of benchmarks/digits.py or seeds.py. Those of docs/performance.md are
speed/*.json, files of benchmarks/inversion_speed.py, and routing/*.json, files of benchmarks/routing.py. Those of
docs/ablation.md are ablation/*.json, files of benchmarks/ablation.py, and those of docs/benchmark.md
bench/*/results.jsonl, files that `fedmitr bench` has written; of one of them are the rivals of README.md.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import ablation
import benches
from security import document as security
from speed import document, routes

from fedmitr_flwr.bench.markup import origin, spread, table
from fedmitr_flwr.report.words import data_set, measure, model, skew

ROOT = Path(__file__).resolve().parents[1]
UPLOADS = ("Clients alone, mean", "One-round FedAvg")
STUDENT = ("Ensemble", "Student", "Student - FedAvg", "Student / ensemble, %", "Server, s")

NOTHING = "No results are committed yet."

Row = Mapping[str, Any]


def student(row: Row) -> float:
    return float(row["accuracy"]["student"])


def fedavg(row: Row) -> float:
    return float(row["accuracy"]["fedavg"])


def ensemble(row: Row) -> float:
    return float(row["accuracy"]["ensemble"])


def local_mean(row: Row) -> float:
    return float(mean(value for value in row["accuracy"]["local"] if value is not None))


def gain(row: Row) -> float:
    """Points over one-round FedAvg, of one seed."""
    return student(row) - fedavg(row)


def reached(row: Row) -> float:
    """Percent of the ensemble's accuracy, of one seed."""
    return 100 * student(row) / ensemble(row)


def server_seconds(row: Row) -> float:
    """All stages of the server phase, evaluation too."""
    return float(sum(row["seconds"].values()))


def study(name: str, content: Mapping[str, Any]) -> list[str]:
    """One section: the uploads' own lines, which every cell shares, and one line per cell.

    The ensemble is a cell's own: its weights may be estimated from the cell's images.
    """
    rows, config = content["rows"], content["config"]
    seeds = {row["seed"]: row for row in rows}
    references = (local_mean, fedavg)
    head = [*UPLOADS, *rows[0].get("methods", {}), *(f"Ensemble, by {name}" for name in rows[0].get("ensembles", {}))]
    for row in rows:
        if any(line(row) != line(seeds[row["seed"]]) for line in references):
            raise ValueError(f"{name}: the cells of seed {row['seed']} are not of the same uploads")
    return [
        f"### {title(config)}",
        "",
        f"Seeds {', '.join(map(str, sorted(seeds)))}. {measure(config)} in percent, last epoch; mean ± sample standard "
        "deviation (n). All lines are of the same uploads.",
        "",
        *table(head, [[spread(map(line, seeds.values())) for line in references] + others(seeds.values())]),
        "",
        *table(["Inversion", "Relabelling", *STUDENT], cells(rows, config)),
        "",
        f"Command: `{content['command']}`",
        "",
        origin(content),
    ]


def others(rows: Collection[Row]) -> list[str]:
    """Where a study tells them (benchmarks/seeds.py): other methods, and mixtures of probabilities, without images."""
    one = next(iter(rows))
    told = [(kind, name) for kind in ("methods", "ensembles") for name in one.get(kind, {})]
    return [spread(row[kind][name] for row in rows) for kind, name in told]


def cells(rows: Iterable[Row], config: Mapping[str, Any]) -> list[list[str]]:
    """One line for each pair of inversion and relabelling, over its seeds."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["inversion.mode"], row["relabel.mode"]), []).append(row)
    default = (config["inversion.mode"], config["relabel.mode"])
    return [
        [cell[0], cell[1] + " (default)" * (cell == default), *student_columns(same)] for cell, same in found.items()
    ]


def student_columns(rows: Sequence[Row]) -> list[str]:
    lines = (ensemble, student, gain, reached)
    return [*(spread(map(line, rows)) for line in lines), spread(map(server_seconds, rows), 0)]


def title(config: Mapping[str, Any]) -> str:
    return f"{data_set(config)}, {skew(config)}, {config['partition.clients']} clients, {model(config)}"


def block(results: Path) -> str:
    """The Markdown of all files."""
    sections: list[list[str]] = []
    for path in sorted(results.glob("*.json")):
        try:
            sections.append(study(path.name, json.loads(path.read_text(encoding="utf-8"))))
        except KeyError as error:
            raise ValueError(
                f"{path}: no {error.args[0]!r}; is it a file of benchmarks/digits.py or seeds.py?"
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); make it again") from error
    return "\n\n".join("\n".join(section) for section in sections) or NOTHING


def renewed(path: Path, blocks: Mapping[str, str]) -> tuple[str, str]:
    """A document's text as it is, and with each block between the two marks of its name."""
    old = new = path.read_text(encoding="utf-8")
    for name, inside in blocks.items():
        new = _replaced(path, new, name, inside)
    return old, new


def _replaced(path: Path, text: str, name: str, inside: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} has no {begin} with an {end} behind it; put the two lines where tables belong")
    return f"{before}{begin}\n\n{inside}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where `--check` finds a block out of date; 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--performance", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--security", type=Path, default=ROOT / "docs" / "security.md")
    parser.add_argument("--ablation", type=Path, default=ROOT / "docs" / "ablation.md")
    parser.add_argument("--benchmark", type=Path, default=ROOT / "docs" / "benchmark.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    try:
        texts = {
            options.readme: renewed(
                options.readme,
                {"rivals": benches.headline(options.results / "bench"), "results": block(options.results)},
            ),
            options.performance: renewed(
                options.performance,
                {
                    "speed": document.block(options.results / "speed"),
                    "routing": routes.block(options.results / "routing"),
                },
            ),
            options.security: renewed(
                options.security,
                {
                    "hostile": security.hostile(options.results / "security"),
                    "privacy": security.privacy(options.results / "privacy"),
                },
            ),
            options.ablation: renewed(options.ablation, {"ablation": ablation.block(options.results / "ablation")}),
            options.benchmark: renewed(options.benchmark, {"bench": benches.block(options.results / "bench")}),
        }
    except (OSError, ValueError) as error:  # UserError, of a bench's file, is a ValueError
        print(f"table: error: {error}", file=sys.stderr)
        return 2
    stale = {path: new for path, (old, new) in texts.items() if new != old}
    for path, new in stale.items():
        if options.check:
            print(f"{path} is out of date; run: python benchmarks/table.py", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

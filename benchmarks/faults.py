"""Write docs/faults.md anew: what the tests of a deployment's faults, the soak and large demonstrations have recorded.

FEDMITR_FAULTS=benchmarks/results/faults/one.json make test-deploy
python benchmarks/soak.py --json benchmarks/results/faults/soak.json
python deploy/demo.py --clients 4 --json benchmarks/results/faults/memory_vit_base.json ...
python benchmarks/faults.py
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmitr_flwr.bench.markup import origin, table
from fedmitr_flwr.report.words import model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "faults"
TARGET = ROOT / "docs" / "faults.md"

INTRODUCTION = """# Faults

What happens when something breaks, and how it goes on. Made by `python benchmarks/faults.py` from what
`make test-deploy` ([tests/test_deploy.py](../tests/test_deploy.py)) and
[benchmarks/soak.py](../benchmarks/soak.py) recorded; nothing is typed by hand. How to run a federation is in
[deploy/README.md](../deploy/README.md).

## One fault at a time

A SuperLink with TLS and two authenticated SuperNodes, `a` and `b`, each with images of its own, on one machine. RUN
is the run folder. In every line the run ended in the weights and synthetic images of an undisturbed run, bit by bit,
and all uploads were as there: a test that does not get there records nothing. "Training" counts every start of a
local training, the one that was disturbed included: a client that has finished one does not begin a second one.
"""

SOAK = """
## Fifty clients of which ten fail

Flower's simulation engine; for each seed ten clients are drawn, of which seven raise, two send NaN and one takes its
Ray actor with it. After each step all uploads on disk had the bits of an undisturbed run's; a run that failed named
exactly the clients that were missing; and the run that was completed ended in the bits of an undisturbed run.
"""


MEMORY = """
## Memory

Uploads are fetched one at a time and written to disk before the next one is; averaging reads them one at a time, too.
Peak resident memory while the whole federation ran on one machine, as Linux counts it (VmHWM), of the largest process
of each kind; bytes are of one upload. With a method that makes images the server phase takes more, by the model, the
images at once and the teachers in memory.
"""


def fault_lines(rows: list[dict[str, Any]]) -> list[str]:
    head = ["Fault", "What one reads", "On disk then", "How it goes on", "Asked then", "Training"]
    return table(head, [[*map(_cell, _told(row))] for row in rows if row["fault"] != "nothing"])


def _told(row: dict[str, Any]) -> list[str]:
    reads = "<br>".join(f"`{line}`" for line in _once(row["reads"])) or "nothing"
    asked = ", ".join(row["asked"]) or "nobody"
    starts = Counter(row["trained"])
    training = ", ".join(f"{who} {times}x" if times > 1 else who for who, times in sorted(starts.items())) or "nobody"
    return [row["fault"], reads, "<br>".join(_files(row["disk"])), row["goes_on"], asked, training]


def _once(lines: Iterable[str]) -> list[str]:
    """Of lines that differ in numbers only, the first."""
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(re.sub(r"\d+", "", line), line)
    return list(first.values())


def _files(names: list[str]) -> list[str]:
    """Uploads and checkpoints; everything else only where the run has ended."""
    if "result.json" in names:
        return ["everything"]
    return [f"`{name}`" for name in names if name.startswith(("uploads/", "work/"))] or ["no upload"]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def soak_lines(rows: list[dict[str, Any]]) -> list[str]:
    head = ["Seed", "Step", "Asked", "Run", "Uploads on disk", "Refused", "Seconds"]
    cells = [
        [str(row["seed"]), row["step"], str(row["asked"]), "failed" if row["status"] else "completed"]
        + [str(row[key]) for key in ("uploads", "refused")]
        + [f"{row['seconds']:.0f}"]
        for row in rows
    ]
    return table(head, cells)


def memory_lines(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    head = ["Model", "Method", "Clients", "Upload, MB", "ServerApp, GB", "SuperLink, GB", "ClientApp, GB", "Seconds"]
    cells = []
    for run in runs:
        config, peaks = run["config"], run["peak_bytes"]
        sizes = [config["method"], str(config["partition.clients"]), f"{max(run['bytes_up']) / 1e6:.0f}"]
        peaks = [f"{peaks[title] / 1e9:.2f}" for title in ("flwr-serverapp", "flower-superlink", "flwr-clientapp")]
        cells.append([model(config), *sizes, *peaks, f"{run['wall_seconds']:.0f}"])
    return table(head, cells)


def provenance(content: Mapping[str, Any]) -> list[str]:
    return ["", f"Command: `{content['command']}`", "", origin(content)]


def document(results: Path = RESULTS) -> str:
    faults, soak = (json.loads((results / name).read_text(encoding="utf-8")) for name in ("one.json", "soak.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("memory_*.json"))]
    codes = ", ".join(sorted({row["code"] for row in faults}))
    lines = [INTRODUCTION, *fault_lines(faults), "", f"Code {codes}.", SOAK, *soak_lines(soak["rows"])]
    lines += [*provenance(soak), MEMORY, *memory_lines(runs)]
    for run in runs:
        lines += provenance(run)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")

"""Class routing: how many teachers an inversion asks, and what the student loses or gains by it.

Digits, Dirichlet 0.1, 10 clients. For each seed the clients train once; every arm fuses the same uploads. Thresholds
were chosen by the share of teachers that they ask on seeds 100 and 101, not by accuracy; all else is the defaults.

    python benchmarks/routing.py --seeds 0,1,2 --json benchmarks/results/routing/digits_dirichlet0.1_k10.json
"""

import json
import tempfile
from statistics import mean
from typing import Any

from speed.routes import arms
from study import facts, run

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.runs.folder import RunFolder

ARMS = (("counts", 0.0), ("counts", 0.1), ("estimated", 0.0), ("estimated", 0.3))  # ensemble.weights, inversion.route
UPLOADS = {"partition.alpha": 0.1, "partition.clients": 10, "upload.extras": "counts", "threads": 1}


def row(folder: RunFolder) -> dict[str, Any]:
    """What the table needs of one run: its result, and the teachers that the inversion of its pool asked."""
    result = folder.read_result()
    lines = map(json.loads, folder.metrics_path.read_text(encoding="utf-8").splitlines())
    asked = [line["teachers_asked"] for line in lines if line["stage"] == "inversion"]
    settings = {key: result["config"][key] for key in ("ensemble.weights", "inversion.route")}
    kept = {key: result[key] for key in ("seed", "accuracy", "seconds", "partition_sha256")}
    return settings | {"teachers_asked": mean(asked)} | kept


def one_seed(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All arms of one seed, on the same uploads; and what the runs say of code, machine and settings."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        config = Config.from_flat({"seed": seed, "method": "fedavg", "out-dir": scratch} | UPLOADS)
        uploads = pipeline.run(config, f"seed-{seed}")
        for weights, threshold in ARMS:
            settings = {"ensemble.weights": weights, "inversion.route": threshold}
            rows.append(row(pipeline.fuse(uploads, "fedmitr", settings)))
            accuracy = rows[-1]["accuracy"]
            shown = (
                f"asked {rows[-1]['teachers_asked']:.3f} student {accuracy['student']} ensemble {accuracy['ensemble']}"
            )
            print(f"seed {seed} {weights:9} route {threshold:g}: {shown}", flush=True)
        return rows, facts(uploads)


if __name__ == "__main__":
    print("\n".join(arms(run("routing.py", __doc__, one_seed))))

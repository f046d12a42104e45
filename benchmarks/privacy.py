"""Digits, Dirichlet 0.3, 5 clients, each with differential privacy for its images: what the model costs.

For each seed and each ε the clients train once, by DP-SGD; ε = 0 is the same training without clipping and noise.
Batch, epochs and learning rate are this study's (`LOCAL`), chosen on seed 100 and validation images, for all ε alike.
To be cheap, the model has two blocks, and the student one epoch of few and rough images (`hostile.MODEL`, `SMALL`).
Noise comes from the operating system: nobody can repeat it, and another run of this script gives other figures.

    python benchmarks/privacy.py --seeds 0,1,2 --json benchmarks/results/privacy/digits.json
"""

import tempfile
from statistics import mean
from typing import Any

from hostile import MODEL, SMALL
from study import facts, run

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config

BUDGETS = (0.0, 32.0, 8.0, 2.0)  # 0: none
LOCAL = {"local.epochs": 30, "local.batch-size": 64, "local.optimizer": "adamw", "local.lr": 2e-3, "threads": 1}
LOCAL |= {"local.outliers": 0}  # which private training does not allow


def one_seed(seed: int, changes: dict[str, Any] | None = None) -> Any:
    """A row for each ε; and what the runs say of code, machine and settings."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for epsilon in BUDGETS:
            flat = {"seed": seed, "method": "fedmitr", "out-dir": scratch, "privacy.epsilon": epsilon}
            flat |= MODEL | LOCAL | SMALL
            folder = pipeline.run(Config.from_flat(flat | (changes or {})), f"seed-{seed}-{epsilon:g}")
            accuracy = dict(folder.read_result()["accuracy"])
            accuracy["local"] = mean(accuracy["local"])
            kept = {name: accuracy[name] for name in ("local", "fedavg", "ensemble", "student")}
            spent = max(upload.epsilon or 0.0 for upload in folder.load_uploads())
            rows.append({"seed": seed, "epsilon": epsilon, "spent": spent, "accuracy": kept})
            print(f"seed {seed} ε {epsilon:g} (spent {spent:.2f}): {kept}", flush=True)
        return rows, facts(folder)


if __name__ == "__main__":
    run("privacy.py", __doc__, one_seed)

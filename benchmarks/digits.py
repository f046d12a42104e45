"""Digits, Dirichlet 0.3, 5 clients: the student against its rivals, and the ablation, on identical uploads.

For each seed the clients train once; every cell of {dense, sparse, pri4} x {none, drop, tokens} then fuses the same
uploads. All other settings are those of `make demo`, configs/digits.toml. The last epoch is reported; no setting was
chosen on these seeds.

    python benchmarks/digits.py --seeds 0,1,2 --json benchmarks/results/digits_dirichlet0.3.json
"""

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from study import facts, remembered, run

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.methods import fedmitr
from fedmitr_flwr.runs.folder import RunFolder

DEMO = Path(__file__).resolve().parents[1] / "configs" / "digits.toml"
INVERSION = ("dense", "sparse", "pri4")
RELABEL = ("none", "drop", "tokens")


def row(folder: RunFolder) -> dict[str, Any]:
    """What the table needs of one result.json."""
    result = folder.read_result()
    kept = ("seed", "accuracy", "seconds", "synthetic_images", "partition_sha256")
    settings = {key: result["config"][key] for key in ("inversion.mode", "relabel.mode")}
    return settings | {key: result[key] for key in kept}


def one_seed(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All cells of one seed, on the same uploads; and what the runs say of code, machine and settings."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        own = {"seed": seed, "method": "fedavg", "out-dir": scratch, "threads": 1}
        config = Config.from_flat(own, base=Config.from_file(DEMO))
        uploads = pipeline.run(config, f"seed-{seed}")
        fedmitr.invert = remembered({})
        for inversion, relabel in product(INVERSION, RELABEL):
            settings = {"inversion.mode": inversion, "relabel.mode": relabel}
            folder = pipeline.fuse(uploads, "fedmitr", settings)
            rows.append(row(folder))
            if relabel != RELABEL[0]:  # the images were remembered: report what they cost when they were made
                rows[-1]["seconds"]["inversion"] = rows[-2]["seconds"]["inversion"]
            accuracy = rows[-1]["accuracy"]
            shown = " ".join(f"{name} {accuracy[name]:.2f}" for name in ("student", "fedavg", "ensemble"))
            print(f"seed {seed} {inversion:6} {relabel:10} {shown}", flush=True)
        return rows, facts(uploads)


if __name__ == "__main__":
    run("digits.py", __doc__, one_seed)

"""Digits, Dirichlet 0.3, 5 clients: the student against its rivals, and the ablation, on identical uploads.

For each seed the clients train once; every cell of {dense, sparse, pri} x {none, drop, tokens, complement} then fuses
the same uploads. All other settings are the defaults. The last epoch is reported; no setting was chosen on these seeds.

    python benchmarks/digits.py --seeds 0,1,2 --json benchmarks/results/digits_dirichlet0.3.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.report.run_folder import RunFolder

INVERSION = ("dense", "sparse", "pri")
RELABEL = ("none", "drop", "tokens", "complement")


def row(folder: RunFolder) -> dict[str, Any]:
    """What the table needs of one result.json."""
    result = folder.read_result()
    kept = ("seed", "accuracy", "seconds", "synthetic_images", "partition_sha256")
    settings = {key: result["config"][key] for key in ("inversion.mode", "relabel.mode")}
    return settings | {key: result[key] for key in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            config = Config.from_flat({"seed": seed, "method": "fedavg", "out-dir": scratch})
            uploads = pipeline.run(config, f"seed-{seed}")
            for inversion in INVERSION:
                for relabel in RELABEL:
                    settings = {"inversion.mode": inversion, "relabel.mode": relabel}
                    folder = pipeline.fuse(uploads, "fedmitr", settings)
                    rows.append(row(folder))
                    accuracy = rows[-1]["accuracy"]
                    shown = " ".join(f"{name} {accuracy[name]:.2f}" for name in ("student", "fedavg", "ensemble"))
                    print(f"seed {seed} {inversion:6} {relabel:10} {shown}", flush=True)
            result = folder.read_result()
            about = {key: result[key] for key in ("fingerprint", "versions", "machine", "config")}
    command = f"python benchmarks/digits.py --seeds {arguments.seeds} --json {arguments.json}"
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"command": command, **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

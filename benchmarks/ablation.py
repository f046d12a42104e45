"""What each part of FedMITR is worth, one change at a time: from the defaults, or from the settings of a file.

For each seed the clients train once, and every line fuses the same uploads; only a change of the clients' training has
uploads of its own, of the same partition. Differences are to the unchanged student of the same seed. Nothing is chosen
here: defaults come from other seeds and validation images. "Agreement", for reading this table only, is the share of
synthetic images of which a model that was trained on all clients' images in one place says the intended class.

    python benchmarks/ablation.py --seeds 0,1,2 --json benchmarks/results/ablation/digits.json
    python benchmarks/ablation.py -c configs/cifar10_deit.toml --json benchmarks/results/ablation/cifar10_deit.json
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from markup import provenance, sections
from study import facts, remembered, run
from timm.models.vision_transformer import VisionTransformer

from fedmitr_flwr import pipeline
from fedmitr_flwr.bench.markup import spread, table
from fedmitr_flwr.central import train_centrally
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config
from fedmitr_flwr.inversion import scout
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.judge import lines
from fedmitr_flwr.methods import fedmitr
from fedmitr_flwr.report.words import data_set, measure, model, skew
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit.build import vit_of

Changes = dict[str, object]
Row = Mapping[str, Any]
Parts = dict[str, list[Changes]]

SCRATCH: Parts = {
    "Nothing": [{}],
    "Ensemble": [
        {"ensemble.weights": "uniform"},
        {"ensemble.weights": "size"},
        {"ensemble.weights": "counts"},
        {"ensemble.weights": "learned"},
        {"ensemble.combine": "logits"},
    ],
    "Images": [
        {"inversion.mode": "dense"},
        {"inversion.mode": "pri4"},
        {"inversion.steps": 30, "distill.images-per-epoch": 500, "distill.passes": 10},
    ],
    "Relabelling": [{"relabel.mode": "none"}, {"relabel.mode": "drop"}, {"relabel.mode": "complement"}],
    "Start of the student": [
        {"distill.init": "initial"},
        {"distill.init": "classwise"},
        {"distill.extrapolate": 0.0},
    ],
    "Clients": [
        {"local.outliers": 0.0},
        {"local.prior-adjust": 1.0},
        {"local.average": 0.5},
    ],
}
PRETRAINED: Parts = {  # from the settings of a file; few lines, for the better part of an hour a seed
    "Nothing": [{}],
    "Images": [{"inversion.mode": "pri4"}],
    "Relabelling": [{"relabel.mode": "none"}],
    "Start of the student": [{"distill.init": "average"}, {"distill.init": "initial"}],
}
SAME_IMAGES = ("relabel.", "distill.init", "distill.extrapolate")
HEAD = ("Changed", "Student", "Difference", "Ensemble", "FedAvg", "Agreement", "Server, s")
UNCHANGED = "unchanged"
UPLOADS: Changes = {"method": "fedavg", "threads": 1, "upload.extras": "counts", "screen.mode": "off"}


def parts_of(config: Config) -> Parts:
    """What is changed there."""
    return SCRATCH if config.model.weights == "none" else PRETRAINED


def one_seed(seed: int, settings: dict[str, object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All lines of one seed; and what the runs say of code, machine and settings."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Config.from_flat({**settings, "seed": seed, "out-dir": scratch, **UPLOADS})
        uploads = pipeline.run(base, f"seed-{seed}")
        known = lines(uploads.load_uploads(), uploads.config)
        outsider = model_of(train_centrally(uploads))
        remember = remembered({})
        for part, changes in ((part, changes) for part, of_part in parts_of(base).items() for changes in of_part):
            shared = all(key.startswith(SAME_IMAGES) for key in changes)
            fedmitr.invert = scout.invert = remember if shared else invert
            if any(key.startswith("local.") for key in changes):
                own = pipeline.run(Config.from_flat(changes, base=base), f"seed-{seed}-{len(rows)}")
                folder = pipeline.fuse(own, "fedmitr", changes)
            else:
                folder = pipeline.fuse(uploads, "fedmitr", changes, lines=known)
            row = {
                "seed": seed,
                "part": part,
                "changes": changes,
                "agreement": agreement(outsider, folder),
                **told(folder),
            }
            if shared and rows:  # the images were remembered: report what they cost when they were made
                row["seconds"]["inversion"] = rows[0]["seconds"]["inversion"]
            rows.append(row)
            print(f"seed {seed} {named(changes):40} {row['accuracy']['student']:.2f}", flush=True)
        return rows, facts(uploads)


def model_of(folder: RunFolder) -> VisionTransformer:
    return vit_of(folder.config.model, load_tensors(folder.model_path)[0]).eval()


@torch.no_grad()
def agreement(outsider: VisionTransformer, folder: RunFolder) -> float:
    """In percent."""
    pool, _ = load_tensors(folder.pool_path)
    return 100 * (outsider(pool["images"]).argmax(1) == pool["targets"]).float().mean().item()


def told(folder: RunFolder) -> dict[str, Any]:
    result = folder.read_result()
    return {key: result[key] for key in ("accuracy", "seconds", "synthetic_images", "partition_sha256")}


def named(changes: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {str(value).lower()}" for key, value in changes.items()) or UNCHANGED


def block(results: Path) -> str:
    """The Markdown of all files of a folder."""
    return sections(results, section, "ablation.py")


def section(content: Mapping[str, Any]) -> list[str]:
    """One file: a table with a line above each part, and where it comes from."""
    rows, config = content["rows"], content["config"]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    return [
        f"### Ablation: {data_set(config)}, {skew(config)}, {config['partition.clients']} clients, {model(config)}",
        "",
        f"Seeds {seeds}; {measure(config).lower()} in percent, last epoch. Student, and difference from the unchanged "
        "student seed by seed: mean ± sample standard deviation (n). The other columns are means.",
        "",
        *table(HEAD, cells(rows)),
        "",
        *provenance(content),
    ]


def cells(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each change, over its seeds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(named(row["changes"]), []).append(row)
    default = {row["seed"]: row["accuracy"]["student"] for row in found[UNCHANGED]}
    table_lines: list[list[str]] = []
    part = None
    for name, same in found.items():
        if name != UNCHANGED and same[0]["part"] != part:
            part = same[0]["part"]
            table_lines.append([f"*{part}*", *[""] * (len(HEAD) - 1)])
        students = [row["accuracy"]["student"] for row in same]
        table_lines.append(
            [
                f"`{name}`",
                spread(students),
                spread(row["accuracy"]["student"] - default[row["seed"]] for row in same),
                *(f"{mean(row['accuracy'][key] for row in same):.1f}" for key in ("ensemble", "fedavg")),
                f"{mean(row['agreement'] for row in same):.1f}",
                f"{mean(sum(row['seconds'].values()) for row in same):.0f}",
            ]
        )
    return table_lines


if __name__ == "__main__":
    run("ablation.py", __doc__, one_seed, takes_settings=True)

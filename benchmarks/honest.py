"""How far honest clients stay from what screening leaves out by default: worst values over many federations.

Every cell is a folder of honest uploads, with all that `upload` can ask for; one that is missing is made. Nothing is
fused. Cells of one epoch are there for their statistics, which no training changes, and for updates that are short.

    python benchmarks/honest.py --runs FOLDER --json benchmarks/results/screening/honest.json [--only digits]
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from study import scripts

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.errors import ConfigError, DataError
from fedmitr_flwr.files import write_text
from fedmitr_flwr.fingerprint import fingerprint
from fedmitr_flwr.report.result import machine, versions
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.screening.screen import screen
from fedmitr_flwr.screening.sums import TOLD, named, reaches
from fedmitr_flwr.screening.weights import Measured, mean_cosines
from fedmitr_flwr.settings import read_flat
from fedmitr_flwr.statistics.frozen import statistics_of
from fedmitr_flwr.statistics.moments import last_norm
from fedmitr_flwr.vit.build import initial_weights

Flat = dict[str, Any]

CONFIGS = Path(__file__).parents[1] / "configs"
EXTRAS = {"upload.statistics": True, "upload.variances": True, "upload.directions": 8}
UPLOADS = EXTRAS | {"method": "fedavg", "threads": 1, "screen.mode": "off"}
PARTITIONS: Mapping[str, Flat] = {
    "a0.3": {"partition.alpha": 0.3},
    "a0.1": {"partition.alpha": 0.1},
    "c2": {"partition.scheme": "classes-per-client"},
    "a0.05": {"partition.alpha": 0.05, "partition.min-size": 5},
    "iid": {"partition.scheme": "iid"},
}
DATA: Mapping[str, Flat] = {
    "digits": {},
    "fashion": {"-c": "fashion_mnist.toml", "data.path": "../shared/data/fashion_mnist"},
    "cifar": {
        "-c": "cifar10_deit.toml",
        "data.path": "../shared/data/cifar10",
        "data.train-limit": 2000,
        "model.weights": "../shared/weights/deit_tiny_patch16_224/model.safetensors",
    },
}
SHORT = {"local.epochs": 1}
SEEDS = (0, 1, 2, 3, 4, 5, 100, 101)


def cells() -> Iterator[tuple[str, Flat]]:
    """Name and settings of each federation, the cheap ones first."""
    for seed in SEEDS:
        for clients in (3, 5, 10):
            for name in PARTITIONS:
                yield f"digits-{name}-{clients}-{seed}-e1", _cell("digits", name, clients, seed) | SHORT
    for seed in (0, 1):
        for data in ("fashion", "cifar"):
            for clients in (3, 5, 10):
                for name in PARTITIONS:
                    yield f"{data}-{name}-{clients}-{seed}-e1", _cell(data, name, clients, seed) | SHORT
    for clients in (5, 10, 3):
        for name in PARTITIONS:
            yield f"digits-{name}-{clients}-0", _cell("digits", name, clients, 0)
    for optimizer in ("adamw", "sgd"):
        flat = _cell("digits", "a0.05", 5, 0) | {"local.optimizer": optimizer, "local.lr": 1e-3}
        yield f"digits-a0.05-5-0-{optimizer}", flat
    for data in ("fashion", "cifar"):
        for name in ("a0.1", "c2"):
            yield f"{data}-{name}-5-0", _cell(data, name, 5, 0)


def _cell(data: str, partition: str, clients: int, seed: int) -> Flat:
    flat = dict(DATA[data])
    named_file = flat.pop("-c", None)
    settings = read_flat(CONFIGS / named_file) if named_file else {}
    return settings | flat | PARTITIONS[partition] | {"partition.clients": clients, "seed": seed, **UPLOADS}


def run_of(name: str, flat: Flat, runs: Path) -> RunFolder | None:
    """The folder of a cell, its uploads made if they are missing; None: no such partition, or no such data here."""
    try:
        config = Config.from_flat({**flat, "out-dir": str(runs)})
        folder = RunFolder.open(runs / name) if (runs / name).exists() else RunFolder.create(config, name)
        initial = initial_weights(config.model, config.seed)
        for client in folder.missing(config.partition.clients):
            folder.save_upload(pipeline.train_client(config, client, initial))
    except (ConfigError, DataError) as error:
        print(f"{name}: {error}", flush=True)
        return None
    return folder


def measure(name: str, folder: RunFolder) -> dict[str, Any]:
    """What the checks look at, client by client, and whom they leave out or name."""
    config, uploads = folder.config, folder.load_uploads()
    start = initial_weights(config.model, config.seed)
    measured = Measured.of(uploads, start)
    every = [statistics_of(upload) for upload in uploads]
    names = [named([*every[:k], *every[k + 1 :]], own) for k, own in enumerate(every)]
    clear = Config.from_flat({"screen.mode": "clear", "screen.images": 0}, base=config)
    found = screen(uploads, clear, torch.device("cpu"))
    return {
        "cell": name,
        "epochs": config.local.epochs,
        "images": [upload.num_examples for upload in uploads],
        "length": measured.away.tolist(),
        "direction": mean_cosines(measured.cosines).tolist(),
        "start": [] if measured.kept is None else measured.kept.tolist(),
        "size": measured.owned.tolist(),
        "reach": reaches(every, last_norm(start)).tolist(),
        "names": [each.kept for each in names if each and each.gain > TOLD],
        "left out": found.excluded,
        "unusual": [[finding.client, finding.check, finding.value] for finding in found.findings],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the cells' run folders")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="cells whose name begins so")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/honest.py", *sys.argv[1:]])
    origin = {"fingerprint": fingerprint(), "versions": versions(), "machine": machine("cpu"), "config": UPLOADS}
    rows: list[dict[str, Any]] = []
    for name, flat in cells():
        folder = run_of(name, flat, arguments.runs) if name.startswith(arguments.only) else None
        if folder:
            rows.append(measure(name, folder))
            content = {"command": command, "scripts": scripts(), **origin, "rows": rows}
            write_text(arguments.json, json.dumps(content, indent=1) + "\n")
            print(name, "left out:", rows[-1]["left out"], "unusual:", rows[-1]["unusual"], flush=True)

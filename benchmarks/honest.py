"""How far honest clients stay from what screening leaves out by default: worst values over many federations.

Trained cells are folders of honest uploads; one that is missing is made. Nothing is fused. The others are of statistics
alone, which no training changes. `committed` are all cells that a committed result is of, trained as they were there.
Cells that are in the file already are kept as they are: a long study goes on over several starts.

    python benchmarks/honest.py --runs FOLDER --json benchmarks/results/screening/honest.json [--only BEGINNING ...]
"""

import argparse
import json
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hostile import MODEL
from markup import scripts
from torch import Tensor

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, DataError
from fedmitr_flwr.common.files import write_text
from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.provenance import machine, versions
from fedmitr_flwr.config import Config, DataConfig, ModelConfig
from fedmitr_flwr.config.text import read_flat
from fedmitr_flwr.data.shares import parts_of
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.merging.closed_form import statistics_of
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.screening.screen import screen
from fedmitr_flwr.screening.sums import SEPARABLE, named, reaches, strange_sums
from fedmitr_flwr.screening.weights import Measured, mean_cosines
from fedmitr_flwr.statistics.moments import Statistics, frozen_features, like, measure, packed, problem, sent
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import initial_weights, vit_of

Flat = dict[str, Any]

CPU = torch.device("cpu")

CONFIGS = Path(__file__).parents[1] / "configs"
UPLOADS = {"upload.extras": "variances, moments", "method": "fedavg", "threads": 1, "screen.mode": "off"}
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
BUDGETS = (0.0, 32.0, 8.0, 2.0)  # ε of configs/bench/privacy.toml; 0: none
PRIVATE: Flat = MODEL | {"local.epochs": 30, "local.batch-size": 64, "local.optimizer": "adamw", "local.lr": 2e-3}
PRIVATE |= {"local.outliers": 0.0, "upload.extras": ""}
SEEDS = (0, 1, 2, 3, 4, 5, 100, 101)
CLIENTS = (3, 5, 10)


def of_statistics() -> Iterator[tuple[str, Flat]]:
    """Name and settings of each federation that is not trained."""
    for data, seeds in (("digits", SEEDS), ("fashion", SEEDS[:2]), ("cifar", SEEDS[:2])):
        for seed in seeds:
            for clients in CLIENTS:
                for name in PARTITIONS:
                    yield f"{data}-{name}-{clients}-{seed}", _cell(data, name, clients, seed)


def trained() -> Iterator[tuple[str, Flat]]:
    """Name and settings of each federation that is trained."""
    for clients in (5, 10, 3):
        for name in PARTITIONS:
            yield f"digits-{name}-{clients}-0", _cell("digits", name, clients, 0)
    few = {"data.train-limit": 300, "local.epochs": 10}
    for optimizer in ("muon", "adamw", "sgd"):
        flat = _cell("digits", "a0.05", 5, 0) | few | {"local.optimizer": optimizer}
        yield f"digits-few-a0.05-5-0-{optimizer}", flat
    for data in ("fashion", "cifar"):
        for name in ("a0.1", "c2"):
            yield f"{data}-{name}-5-0", _cell(data, name, 5, 0)


def committed() -> Iterator[tuple[str, Flat]]:
    """Name and settings of each federation that a committed result is of; of hostile.py's its own file has them."""
    few = {"data.train-limit": 3000, "local.epochs": 10, "data.proxy": 0.01}
    cifar = {"data.train-limit": 5000}
    for seed in (0, 1, 2):
        yield f"digits-{seed}", _cell("digits", "a0.3", 5, seed)
        yield f"routing-{seed}", _cell("digits", "a0.1", 10, seed)
        for name in ("a0.1", "c2", "iid"):
            yield f"fashion-{name}-{seed}", _cell("fashion", name, 5, seed)
        for name in ("a0.1", "c2", "iid"):
            yield f"cpu-{name}-{seed}", _cell("fashion", name, 5, seed) | few
        yield f"cpu-a0.5-{seed}", _cell("fashion", "a0.3", 5, seed) | few | {"partition.alpha": 0.5}
        yield f"cifar-{seed}", _cell("cifar", "a0.1", 5, seed) | cifar
        for epsilon in BUDGETS:
            flat = _cell("digits", "a0.3", 5, seed) | PRIVATE | {"privacy.epsilon": epsilon}
            yield f"privacy-{epsilon:g}-{seed}", flat
    yield "smoke-0", _cell("digits", "a0.3", 5, 0) | {"local.epochs": 20, "data.proxy": 0.1}
    yield "cifar10_cpu-0", _cell("cifar", "a0.1", 5, 0) | cifar | {"data.proxy": 0.02, "local.head-lr": 1e-4}


def _cell(data: str, partition: str, clients: int, seed: int) -> Flat:
    flat = dict(DATA[data])
    named_file = flat.pop("-c", None)
    settings = read_flat(CONFIGS / named_file) if named_file else {}
    return settings | flat | PARTITIONS[partition] | {"partition.clients": clients, "seed": seed, **UPLOADS}


@lru_cache(maxsize=1)
def features(data: DataConfig, model: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Frozen features (N, D) and labels (N,) of all training images."""
    train = load(data, model, with_test=False).train
    return frozen_features(vit_of(model, initial_weights(model, seed)), train, model, CPU), train.labels


def statistics_alone(config: Config) -> list[Statistics]:
    """Of each client, without any training; refused where an upload of them would be."""
    z_ND, labels_N = features(config.data, config.model, config.seed)
    wanted, classes = like(initial_weights(config.model, config.seed), config.upload), config.model.num_classes
    every = []
    for rows in parts_of(config).indices:
        tensors = sent(measure(z_ND[rows], labels_N[rows], classes, variances=True))
        counts = tuple(torch.bincount(labels_N[rows], minlength=classes).tolist())
        if refusal := problem(tensors, counts, wanted):
            raise SystemExit(f"honest statistics are refused: {refusal}")
        every.append(Statistics.of(tensors, counts))
    return every


def of_sums(every: Sequence[Statistics]) -> dict[str, Any]:
    """What the checks of statistics look at, and whom they leave out or name."""
    names = [named([*every[:k], *every[k + 1 :]], own) for k, own in enumerate(every)]
    uploads = [_upload(client, each) for client, each in enumerate(every)]
    findings = strange_sums(uploads)
    return {
        "images": [int(each.counts.sum()) for each in every],
        "reach": reaches(every).tolist(),
        "names": [each.kept for each in names if each and each.gain > SEPARABLE],
        "left out": [finding.client for finding in findings if finding.clear],
        "unusual": [[finding.client, finding.check, finding.value] for finding in findings],
    }


def _upload(client: int, told: Statistics) -> Upload:
    counts = tuple(map(int, told.counts.tolist()))
    tensors = {"sums": told.sums, "moment": packed(told.moment)}
    return Upload(client, {}, sum(counts), 0.0, "", counts, statistics=tensors)


def run_of(name: str, config: Config, runs: Path) -> RunFolder:
    """The folder of a trained cell, its uploads made if they are missing."""
    folder = RunFolder.open(runs / name) if (runs / name).exists() else RunFolder.create(config, name)
    initial = initial_weights(config.model, config.seed)
    for client in folder.missing():
        folder.save_upload(pipeline.train_client(config, client, initial))
    return folder


def of_uploads(folder: RunFolder) -> dict[str, Any]:
    """What all checks of weights and statistics look at, client by client, and whom they leave out or name."""
    config, uploads = folder.config, folder.load_uploads()
    measured = Measured.of(uploads, initial_weights(config.model, config.seed))
    found = screen(uploads, Config.from_flat({"screen.mode": "clear"}, base=config), CPU, images=0)
    sums = of_sums([statistics_of(upload) for upload in uploads]) if config.upload.statistics else {}
    return {
        **sums,
        "length": measured.away.tolist(),
        "direction": mean_cosines(measured.cosines).tolist(),
        "start": [] if measured.kept is None else measured.kept.tolist(),
        "size": measured.owned.tolist(),
        "left out": found.excluded,
        "unusual": [[finding.client, finding.check, finding.value] for finding in found.findings],
    }


def rows_of(runs: Path, only: Sequence[str], known: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """One row for each cell that is not `known`; one that cannot be, or whose data is missing, is named and skipped."""
    kinds = {"statistics": of_statistics(), "trained": trained(), "committed": committed()}
    for kind, cells in kinds.items():
        for name, flat in cells:
            if not f"{kind}-{name}".startswith(tuple(only)) or f"{kind}-{name}" in known:
                continue
            try:
                config = resolve(Config.from_flat({**flat, "out-dir": str(runs)}))
                alone = kind == "statistics"
                values = of_sums(statistics_alone(config)) if alone else of_uploads(run_of(name, config, runs))
            except (ConfigError, DataError) as error:
                print(f"{name}: {error}", flush=True)
                continue
            yield {"cell": name, "kind": kind, **values, "fingerprint": fingerprint()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trained cells' uploads")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[""], help="cells whose kind and name begin so: trained-digits")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/honest.py", *sys.argv[1:]])
    origin = {"versions": versions(), "machine": machine("cpu"), "config": UPLOADS}
    before = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {"rows": []}
    rows: list[dict[str, Any]] = before["rows"]
    for row in rows_of(arguments.runs, arguments.only, {f"{each['kind']}-{each['cell']}" for each in rows}):
        rows.append(row)
        content = {"command": command, "scripts": scripts(), **origin, "rows": rows}
        write_text(arguments.json, json.dumps(content, indent=1) + "\n")
        print(row["cell"], "left out:", row["left out"], "unusual:", row["unusual"], flush=True)

"""How CPU seconds and memory grow with clients K and classes Y, stage by stage, at one budget of images and steps.

    python benchmarks/growth.py --json benchmarks/results/growth/small.json

Every run is `fedmitr run`'s own line in this process: clients of one epoch, then the server phase with screening and
scouting as by default, on 8 px images of noise around a mean for each class, in one thread. Seconds are of the CPU.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from markup import go_on, provenance, sections
from PIL import Image

from fedmitr_flwr import pipeline
from fedmitr_flwr.bench.markup import figure, table
from fedmitr_flwr.common.compute import return_memory
from fedmitr_flwr.config import Config
from fedmitr_flwr.methods import contract
from fedmitr_flwr.resolve import resolve

IMAGES = {"train": 400, "test": 200}
SETTINGS: Mapping[str, object] = {
    **{"device": "cpu", "threads": 1, "local.threads": 1, "model.img-size": 8, "model.patch-size": 2},
    **{"model.in-chans": 1, "model.width": 16, "model.depth": 1, "partition.scheme": "iid", "partition.min-size": 1},
    **{"local.epochs": 1, "inversion.steps": 10, "inversion.batch-size": 50, "distill.rounds": 1},
    **{"distill.images-per-round": 50, "distill.epochs-per-round": 2},
}
STAGES = ("clients", "screening", "scouting", "inversion", "distillation", "evaluation", "rest")
HEAD = ("K", "Y", *STAGES, "all", "× half of K", "peak, MiB")


def images(folder: Path, classes: int) -> None:
    """A folder of images of so many classes."""
    rng = np.random.default_rng(classes)
    means = rng.integers(40, 216, (classes, 8, 8))
    for split, count in IMAGES.items():
        for i in range(count):
            place = folder / split / f"{i % classes:03}"
            place.mkdir(parents=True, exist_ok=True)
            noisy = means[i % classes] + rng.integers(-40, 40, (8, 8))
            Image.fromarray(noisy.astype(np.uint8)).save(place / f"{i:04}.png")


def measured(clients: int, classes: int, made: Path) -> dict[str, Any]:
    """One run: its CPU seconds by stage, and the peak of this process's memory in the server phase."""
    data, out = made / str(classes), made / "runs"
    if not data.exists():
        images(data, classes)
    sizes = {"partition.clients": clients, "model.num-classes": classes, "data.path": str(data), "out-dir": str(out)}
    config = resolve(Config.from_flat({**SETTINGS, **sizes}))
    return_memory()
    folder = pipeline.created(config, f"{clients}-{classes}")
    initial, begin = pipeline.start_of(config), time.process_time()
    with folder.at_work():
        for client in folder.missing():
            pipeline.take_upload(folder, client, initial)
        uploaded = time.process_time()
        result = pipeline.serve(folder).result
    end = time.process_time()
    seconds = {"clients": uploaded - begin, **result["seconds"]}
    seconds["rest"] = end - begin - sum(seconds.values())
    rounded = {stage: round(seconds[stage], 2) for stage in STAGES}
    peak = round(result["peak_memory"]["ram"] / 2**20)
    return {"seconds": rounded, "all": round(end - begin, 2), "peak_mib": peak}


def block(results: Path) -> str:
    """The Markdown of all files of a folder."""
    return sections(results, section, "growth.py")


def section(content: Mapping[str, Any]) -> list[str]:
    """One file: a row for each run, and where they come from."""
    whole = {(row["clients"], row["classes"]): row["all"] for row in content["rows"]}
    rows = []
    for row in content["rows"]:
        half = whole.get((row["clients"] / 2, row["classes"]))
        cells = [*(row["seconds"][stage] for stage in STAGES), row["all"]]
        ratio = figure(row["all"] / half) if half else "-"
        rows.append([str(row["clients"]), str(row["classes"]), *map(figure, cells), ratio, str(row["peak_mib"])])
    return [*table(HEAD, rows), "", *provenance(content)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="5,10,20,50,100,200", help="with 10 classes each")
    parser.add_argument("--classes", default="50,100", help="with 10 clients each")
    parser.add_argument("--json", type=Path, required=True, help="what is in it is not run again")
    options = parser.parse_args(argv)
    contract.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    points = [(int(clients), 10) for clients in options.clients.split(",")]
    points += [(10, int(classes)) for classes in options.classes.split(",") if classes]
    logging.getLogger("fedmitr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as made:
        go_on(options.json, (({"clients": k, "classes": y}, partial(measured, k, y, Path(made))) for k, y in points))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Digits, Dirichlet 0.3, 10 clients, of which 0, 1 or 2 are hostile: what is left of the model.

For each seed the clients train once; an attack is made on copies of their uploads, and every defence fuses the same
ones. To be cheap, the model has two blocks, clients train for 50 epochs, and the student has one epoch of few and
rough images (`MODEL`, `SMALL`): accuracies are for comparison within this study only.
Thresholds of the screen and `TRIM` were chosen on seeds 100 and 101 and validation images.

    python benchmarks/hostile.py --seeds 0,1,2 --json benchmarks/results/security/hostile_digits.json
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from security.attacks import ATTACKS
from study import facts, run

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.judge import Lines, lines
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.screening.screen import screen
from fedmitr_flwr.training.upload import Upload

MODEL = {"model.depth": 2}
UPLOADS = MODEL | {"partition.alpha": 0.3, "partition.clients": 10, "threads": 1, "screen.mode": "off"}
UPLOADS |= {"local.epochs": 50, "flower.quorum": 0.5}
SMALL = {"inversion.steps": 20, "distill.epochs": 1, "distill.images-per-epoch": 80, "distill.passes": 40}
TRIM = 0.2  # of the weight, at each end: what two of ten have
HOSTILE = (1, 2)

Accuracies = dict[str, float]
Memory = dict[
    tuple[int, ...], Accuracies
]  # of the ensemble and the student, by the clients whose honest uploads they had


def defences(uploads: RunFolder, hostile: int, memory: Memory) -> tuple[Accuracies, list[int]]:
    """Accuracy in percent by defence, and the clients that screening left out.

    What screening leaves of one attack is often what it leaves of another: that is fused once.
    """
    known = lines(uploads.load_uploads(), uploads.config)
    found: Accuracies = {"fedavg": known["fedavg"]}
    found["fedmedian"] = fused(uploads, "fedmedian", {}, known)["student"]
    found["krum"] = fused(uploads, "krum", {"krum.hostile": max(1, hostile)}, known)["student"]
    plain = fused(uploads, "fedmitr", {}, known)
    robust = fused(uploads, "fedmitr", {"ensemble.trim": TRIM}, known)

    config = Config.from_flat({"screen.mode": "exclude"}, base=uploads.config)
    outcome = screen(uploads.load_uploads(), config, torch.device("cpu"))
    kept = tuple(upload.client for upload in outcome.kept)
    clean = min(kept) >= hostile
    if outcome.excluded and not (clean and kept in memory):
        left = folder_of(uploads.config, outcome.kept, f"{uploads.path.name}-screened")
        screened = fused(left, "fedmitr", {}, known)
    else:
        screened = memory[kept] if outcome.excluded else plain
    if clean:
        memory[kept] = screened
    for name, accuracy in (("plain", plain), ("exclude", screened), ("trim", robust)):
        found |= {f"{model} {name}": accuracy[model] for model in ("ensemble", "student")}
    return found, outcome.excluded


def fused(uploads: RunFolder, method: str, settings: dict[str, Any], known: Lines) -> Accuracies:
    accuracy: Accuracies = pipeline.fuse(uploads, method, SMALL | settings, lines=known).read_result()["accuracy"]
    return accuracy


def poisoned(honest: RunFolder, attack: str, hostile: int) -> RunFolder:
    """A run folder with the same uploads, but those of the first clients."""
    config, uploads = honest.config, honest.load_uploads()
    changed = [ATTACKS[attack](each, config) if each.client < hostile else each for each in uploads]
    return folder_of(config, changed, f"{attack}-{hostile}")


def folder_of(config: Config, uploads: Sequence[Upload], name: str) -> RunFolder:
    folder = RunFolder.create(config, name)
    for upload in uploads:
        folder.save_upload(upload)
    return folder


def one_seed(seed: int, changes: dict[str, Any] | None = None, attacks: Sequence[str] = tuple(ATTACKS)) -> Any:
    """All cells of one seed; and what the runs say of code, machine and settings."""
    rows: list[dict[str, Any]] = []
    memory: Memory = {}
    with tempfile.TemporaryDirectory() as scratch:
        flat = {"seed": seed, "method": "fedavg", "out-dir": scratch, **UPLOADS, **(changes or {})}
        honest = pipeline.run(Config.from_flat(flat), f"seed-{seed}")
        cells = [("none", 0), *((attack, hostile) for attack in attacks for hostile in HOSTILE)]
        for attack, hostile in cells:
            uploads = poisoned(honest, attack, hostile) if hostile else honest
            accuracy, excluded = defences(uploads, hostile, memory)
            rows.append(
                {"seed": seed, "attack": attack, "hostile": hostile, "accuracy": accuracy, "excluded": excluded}
            )
            shown = " ".join(f"{name} {value:.1f}" for name, value in accuracy.items())
            print(f"seed {seed} {attack:8} {hostile} excluded {excluded}: {shown}", flush=True)
        return rows, facts(honest)


if __name__ == "__main__":
    run("hostile.py", __doc__, one_seed)

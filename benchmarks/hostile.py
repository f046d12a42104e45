"""Digits, Dirichlet 0.3, 10 clients, of which 0, 1 or 2 are hostile: what is left of the model.

For each seed the clients train once; an attack is made on copies of their uploads, and every defence fuses the same
ones. Attacks on the weights are judged by the student, lies in the statistics by what is made of statistics. To be
cheap, the model has two blocks, clients train for 50 epochs, and the student has one epoch of few and rough images
(`MODEL`, `SMALL`): accuracies are for comparison within this study only. "clear" is today's default screening; no
images are made for it, by which it leaves nobody out.

    python benchmarks/hostile.py --seeds 0,1,2 --json benchmarks/results/security/hostile_digits.json
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from markup import facts, scripts
from security.attacks import ATTACKS, LIES

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import UploadError
from fedmitr_flwr.common.files import write_text
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.shares import server_images
from fedmitr_flwr.judge import Lines, evaluate_on, lines
from fedmitr_flwr.merging.closed_form import frozen_weights, pooled
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.screening.screen import screen
from fedmitr_flwr.statistics.heads import lda, ridge
from fedmitr_flwr.uploads.gate import admit
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.taps import network_of

MODEL = {"model.depth": 2}
UPLOADS = MODEL | {"partition.alpha": 0.3, "partition.clients": 10, "threads": 1, "screen.mode": "off"}
UPLOADS |= {"local.epochs": 50, "flower.quorum": 0.5, "upload.extras": "statistics"}
SMALL = {"inversion.steps": 20, "distill.rounds": 1, "distill.images-per-round": 80, "distill.epochs-per-round": 40}
SMALL |= {"upload.extras": ""}
DEFAULT = {"screen.mode": "clear"}
HOSTILE = (1, 2)
CPU = torch.device("cpu")

Accuracies = dict[str, float]
Memory = dict[tuple[int, ...], Accuracies]  # by the clients whose honest uploads they are of


def screened(uploads: Sequence[Upload], config: Config) -> tuple[list[Upload], list[int]]:
    """What the checks of an upload and the default screening leave, and the clients that they do not."""
    passed = [upload for upload in uploads if _passes(upload, config)]
    kept = screen(passed, Config.from_flat(DEFAULT, base=config), CPU, images=0).kept
    known = {upload.client for upload in kept}
    return kept, [upload.client for upload in uploads if upload.client not in known]


def _passes(upload: Upload, config: Config) -> bool:
    try:
        admit(upload, config)
    except UploadError as error:
        print(f"refused: {error}", flush=True)
        return False
    return True


def of_weights(uploads: RunFolder, hostile: int, memory: Memory) -> tuple[Accuracies, list[int]]:
    """Accuracy in percent by defence, and the clients that were left out.

    What is left of one attack is often what is left of another: that is fused once.
    """
    known = lines(uploads.load_uploads(), uploads.config)
    found: Accuracies = {"fedavg": known["fedavg"]}
    found["fedmedian"] = fused(uploads, "fedmedian", {}, known)["student"]
    found["krum"] = fused(uploads, "krum", {"krum.hostile": max(1, hostile)}, known)["student"]
    plain = fused(uploads, "fedmitr", {}, known)
    kept, out = screened(uploads.load_uploads(), uploads.config)
    honest = tuple(upload.client for upload in kept) if min(each.client for each in kept) >= hostile else ()
    if not out:
        clear = plain
    elif honest in memory:
        clear = memory[honest]
    else:
        clear = fused(folder_of(uploads.config, kept, f"{uploads.path.name}-clear"), "fedmitr", {}, known)
    if honest:
        memory[honest] = clear
    for name, accuracy in (("plain", plain), ("clear", clear)):
        found |= {f"{model} {name}": accuracy[model] for model in ("ensemble", "student")}
    return found, out


def fused(uploads: RunFolder, method: str, settings: dict[str, Any], known: Lines) -> Accuracies:
    accuracy: Accuracies = pipeline.fuse(uploads, method, SMALL | settings, lines=known).read_result()["accuracy"]
    return accuracy


def of_statistics(uploads: Sequence[Upload], config: Config, memory: Memory) -> tuple[Accuracies, list[int]]:
    """As `of_weights`, of what statistics make: two heads in closed form."""
    kept, out = screened(uploads, config)
    plain, clients = closed_forms(uploads, config), tuple(upload.client for upload in kept)
    clear = plain if not out else memory.get(clients) or closed_forms(kept, config)
    memory[clients] = clear
    found = {f"{name} plain": value for name, value in plain.items()}
    return found | {f"{name} clear": value for name, value in clear.items()}, out


def closed_forms(uploads: Sequence[Upload], config: Config) -> Accuracies:
    images, _ = server_images(config)
    heads = {make.__name__: make(pooled(uploads)) for make in (lda, ridge)}
    models = {name: network_of(config.model, frozen_weights(config, head)) for name, head in heads.items()}
    return {name: evaluate_on(model, images, config, CPU).accuracy for name, model in models.items()}


def folder_of(config: Config, uploads: Sequence[Upload], name: str) -> RunFolder:
    folder = RunFolder.create(config, name)
    for upload in uploads:
        folder.save_upload(upload)
    return folder


def one_seed(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All cells of one seed; and what the runs say of code, machine and settings."""
    rows: list[dict[str, Any]] = []

    def add(attack: str, hostile: int, found: tuple[Accuracies, list[int]]) -> None:
        accuracy, out = found
        rows.append({"seed": seed, "attack": attack, "hostile": hostile, "accuracy": accuracy, "excluded": out})
        shown = " ".join(f"{name} {value:.1f}" for name, value in accuracy.items())
        print(f"seed {seed} {attack:8} {hostile} left out {out}: {shown}", flush=True)

    memory: Memory = {}
    of_sums: Memory = {}
    with tempfile.TemporaryDirectory() as scratch:
        flat = {"seed": seed, "method": "fedavg", "out-dir": scratch, **UPLOADS}
        honest = pipeline.run(Config.from_flat(flat), f"seed-{seed}")
        config, uploads = honest.config, honest.load_uploads()
        for attack, hostile in (("none", 0), *((lie, hostile) for lie in LIES for hostile in HOSTILE)):
            lying = [LIES[attack](each, config) if each.client < hostile else each for each in uploads]
            add(f"statistics {attack}", hostile, of_statistics(lying, config, of_sums))
        for attack, hostile in (("none", 0), *((attack, hostile) for attack in ATTACKS for hostile in HOSTILE)):
            bad = [ATTACKS[attack](each, config) if each.client < hostile else each for each in uploads]
            folder = folder_of(config, bad, f"{attack}-{hostile}") if hostile else honest
            add(attack, hostile, of_weights(folder, hostile, memory))
        return rows, facts(honest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    every: list[dict[str, Any]] = []
    for each in map(int, arguments.seeds.split(",")):
        rows, about = one_seed(each)
        every += rows
        command = shlex.join(["python", "benchmarks/hostile.py", *sys.argv[1:]])
        content = {"command": command, "scripts": scripts(), **about, "rows": every}
        write_text(arguments.json, json.dumps(content, indent=1) + "\n")

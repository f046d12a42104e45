"""Digits, Dirichlet 0.3, 10 clients, of which 0, 1 or 2 are hostile: what is left of the model.

For each seed the clients train once, with the default settings; an attack is made on copies of their uploads, and every
defence fuses the same ones. To be cheap, the student has fewer images and passes than by default (`SMALL`): its
accuracies are for comparison within this study only. Thresholds of the screen and `TRIM` were chosen on seeds 100 and
101 and validation images.

    python benchmarks/hostile.py --seeds 0,1,2 --json benchmarks/results/security/hostile_digits.json
"""

import tempfile
from collections.abc import Sequence
from typing import Any

from security.attacks import ATTACKS
from study import facts, run

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.judge import lines
from fedmitr_flwr.report.run_folder import RunFolder

UPLOADS = {"partition.alpha": 0.3, "partition.clients": 10, "threads": 1, "screen.mode": "off"}
SMALL = {
    "inversion.steps": 30,
    "distill.epochs": 2,
    "distill.images-per-epoch": 100,
    "distill.passes": 10,
}
TRIM = 0.2  # of the weight, at each end: what two of ten have
HOSTILE = (1, 2)

Accuracies = dict[str, float]


def defences(uploads: RunFolder, hostile: int) -> tuple[Accuracies, list[int]]:
    """Accuracy in percent by defence, and the clients that screening left out."""
    known = lines(uploads.load_uploads(), uploads.config)

    def fused(method: str, **settings: Any) -> dict[str, Any]:
        flat = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
        result: dict[str, Any] = pipeline.fuse(uploads, method, SMALL | flat, lines=known).read_result()
        return result

    found: Accuracies = {"fedavg": known["fedavg"]}
    found["fedmedian"] = fused("fedmedian")["accuracy"]["student"]
    found["krum"] = fused("krum", krum__hostile=max(1, hostile))["accuracy"]["student"]
    plain = fused("fedmitr")
    screened = fused("fedmitr", screen__mode="exclude")
    robust = fused("fedmitr", ensemble__trim=TRIM)
    for name, result in (("plain", plain), ("exclude", screened), ("trim", robust)):
        found |= {f"{model} {name}": result["accuracy"][model] for model in ("ensemble", "student")}
    return found, screened["screen"]["excluded"]


def poisoned(honest: RunFolder, attack: str, hostile: int) -> RunFolder:
    """A run folder with the same uploads, but those of the first clients."""
    config = honest.config
    folder = RunFolder.create(config, f"{attack}-{hostile}")
    for upload in honest.load_uploads():
        folder.save_upload(ATTACKS[attack](upload, config) if upload.client < hostile else upload)
    return folder


def one_seed(seed: int, changes: dict[str, Any] | None = None, attacks: Sequence[str] = tuple(ATTACKS)) -> Any:
    """All cells of one seed; and what the runs say of code, machine and settings."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        flat = {"seed": seed, "method": "fedavg", "out-dir": scratch, **UPLOADS, **(changes or {})}
        honest = pipeline.run(Config.from_flat(flat), f"seed-{seed}")
        cells = [("none", 0), *((attack, hostile) for attack in attacks for hostile in HOSTILE)]
        for attack, hostile in cells:
            uploads = poisoned(honest, attack, hostile) if hostile else honest
            accuracy, excluded = defences(uploads, hostile)
            rows.append(
                {"seed": seed, "attack": attack, "hostile": hostile, "accuracy": accuracy, "excluded": excluded}
            )
            shown = " ".join(f"{name} {value:.1f}" for name, value in accuracy.items())
            print(f"seed {seed} {attack:8} {hostile} excluded {excluded}: {shown}", flush=True)
        return rows, facts(honest)


if __name__ == "__main__":
    run("hostile.py", __doc__, one_seed)

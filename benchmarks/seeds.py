"""FedMITR with the settings of a file, over seeds: the student, one-round FedAvg, and four ways to weigh the ensemble.

Where clients tell what their layers are given (`upload.extras`), what RegMean makes of it is told, too. For each
seed the clients train once. They also tell their class counts, for the line that needs them; FedMITR's own weights are
those of the settings, by default "estimated", which does not look at counts. A seed runs on one thread.

    python benchmarks/seeds.py -c configs/fashion_mnist.toml --seeds 0,1,2 --json benchmarks/results/fashion_mnist.json
"""

import tempfile
from typing import Any

import torch
from study import facts, run

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.shares import server_images
from fedmitr_flwr.ensemble.ensemble import TEMPERATURE, combine_answers, teacher_weights
from fedmitr_flwr.judge import answers_of, lines
from fedmitr_flwr.runs.evaluation import graded
from fedmitr_flwr.runs.folder import RunFolder

WEIGHTS = ("uniform", "size", "counts")  # those that need no images


def one_seed(seed: int, settings: dict[str, object]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row; and what the run says of code, machine and settings."""
    with tempfile.TemporaryDirectory() as scratch:
        own = {"seed": seed, "method": "fedavg", "out-dir": scratch, "threads": 1}
        own["upload.extras"] = f"counts, {settings.get('upload.extras', '')}".rstrip(", ")
        uploads = pipeline.run(Config.from_flat({**settings, **own}), f"seed-{seed}")
        known = lines(uploads.load_uploads(), uploads.config)
        result = pipeline.fuse(uploads, "fedmitr", {}, lines=known).read_result()
        kept = ("seed", "accuracy", "seconds", "client_seconds", "synthetic_images", "partition_sha256")
        row = {key: result["config"][key] for key in ("inversion.mode", "relabel.mode")}
        row |= {key: result[key] for key in kept} | {"ensembles": ensembles(uploads)}
        if uploads.config.upload.moments:
            merged = pipeline.fuse(uploads, "regmean", {}, lines=known).read_result()
            row["methods"] = {"regmean": merged["accuracy"]["student"]}
        print(f"seed {seed} {row['accuracy']} {row['ensembles']} {row['seconds']}", flush=True)
        return [row], facts(uploads)


def ensembles(folder: RunFolder) -> dict[str, float]:
    """Test accuracy in percent of mixtures of the teachers' softened probabilities, and of their mean as they are."""
    config, uploads = folder.config, folder.load_uploads()
    images, _ = server_images(config)
    classes = config.model.num_classes
    answers_KMY = answers_of(uploads, images, config, torch.device("cpu"))

    def accuracy(weights: str, logits_KMY: torch.Tensor) -> float:
        mixed_MY = combine_answers(logits_KMY, teacher_weights(uploads, classes, weights), "probs")
        return graded(mixed_MY, images.labels, classes).accuracy

    softened = {weights: accuracy(weights, answers_KMY) for weights in WEIGHTS}
    return {"mean probability": accuracy("uniform", TEMPERATURE * answers_KMY), **softened}


if __name__ == "__main__":
    run("seeds.py", __doc__, one_seed, takes_settings=True)

"""Who was in the training, and do images come back: attacks on uploads, sums, synthetic images and the student.

`uploads`: of 2 n images of Fashion-MNIST with the classes of one Dirichlet(0.3) client, eight models are trained on
half each, as a client does; each in turn is the target, and the others are the shadow models of LiRA. The attacker
knows all 2 n images and half of the answers: the worst case. `runs`: digits, five clients; images that some client has
trained on against the test images, by the student's loss and by the nearest synthetic image.

    python benchmarks/inference.py uploads --json benchmarks/results/inference/uploads.json
    python benchmarks/inference.py runs --json benchmarks/results/inference/runs.json

What is in the file is not run again: a study can go on over several sittings.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from markup import Cell, go_on
from security.inference import Power, confidence, halves, leverage, likelihood_ratio, nearest, power, returned
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedmitr_flwr import Run, pipeline
from fedmitr_flwr.client.private import train_privately
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.rng import secret, stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images, prepare
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.runs.evaluation import scores_of
from fedmitr_flwr.statistics.moments import frozen_features
from fedmitr_flwr.vit.build import build_vit, initial_weights, vit_of
from fedmitr_flwr.vit.taps import projection, taps

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent / "configs"
DRAWS = 10  # of as many members as there are test images
MODELS = 8  # trained for each cell of `uploads`
SIZES = (50, 200, 1000)  # images of the client
BUDGETS = (32.0, 8.0, 2.0)  # ε, of a client of 200 images
PRIVATE = {"local.optimizer": "adamw", "local.lr": 2e-3, "local.epochs": 30, "local.outliers": 0.0}
SMALL = {"model.depth": 2, "inversion.steps": 20, "distill.rounds": 1, "distill.images-per-round": 80}


def of_uploads(data: str, seeds: list[int]) -> Iterator[Cell]:
    for seed in seeds:
        for size in SIZES:
            yield {"seed": seed, "images": size, "epsilon": 0.0}, partial(one_client, data, seed, size, 0.0)
    for seed in seeds:
        for epsilon in BUDGETS:
            yield {"seed": seed, "images": 200, "epsilon": epsilon}, partial(one_client, data, seed, 200, epsilon)


def one_client(data: str, seed: int, size: int, epsilon: float) -> dict[str, Any]:
    flat = {"seed": seed, "data.path": data, "threads": 1, "upload.extras": "statistics" * (not epsilon)}
    flat |= PRIVATE | {"privacy.epsilon": epsilon} if epsilon else {}
    config = resolve(Config.from_flat(flat, Config.from_file(CONFIGS / "fashion_mnist.toml")))
    rng = stream(seed, "attack", size)
    images = of_one_client(load(config.data, config.model).train, 2 * size, rng)
    member_SN = halves(MODELS, len(images), rng)
    start = initial_weights(config.model, seed)
    rows_SN, right = [], []
    for number, member_N in enumerate(member_SN):
        vit, own = build_vit(config.model), images.subset(member_N.nonzero().squeeze(1))
        vit.load_state_dict(start)
        if epsilon:
            train_privately(vit, own, config, secret(), CPU)
        else:
            train_local(vit, own, config, stream(seed, "attack", number), CPU)
        logits = scores_of(vit.eval(), images, config.model, CPU)
        rows_SN.append(confidence(logits, images.labels))
        hits = (logits.argmax(1) == images.labels).double()
        right.append((hits[member_N].mean().item(), hits[~member_N].mean().item()))
    confidence_SN = torch.stack(rows_SN)
    found: dict[str, list[Power]] = {"loss": [], "lira": [], "sums": []}
    features_ND = frozen_features(vit_of(config.model, start), images, config.model, CPU)
    for number, member_N in enumerate(member_SN):
        others = torch.arange(MODELS) != number
        ratio_N = likelihood_ratio(confidence_SN[number], confidence_SN[others], member_SN[others])
        found["loss"].append(power(confidence_SN[number], member_N))
        found["lira"].append(power(ratio_N, member_N))
        own_ND = features_ND[member_N]
        found["sums"].append(power(-leverage(features_ND, (own_ND.T @ own_ND).float()), member_N))
    accuracies = {"own": 100 * mean(own for own, _ in right), "others": 100 * mean(other for _, other in right)}
    return accuracies | {name: averaged(powers) for name, powers in found.items()}


def of_one_client(images: Images, number: int, rng: torch.Generator) -> Images:
    """So many images, or as many as there are, with the classes of a client of Dirichlet(0.3)."""
    classes = int(images.labels.max()) + 1
    share_Y = torch._sample_dirichlet(torch.full((classes,), 0.3), generator=rng)
    wanted_Y = (number * share_Y).ceil().long()
    order = torch.randperm(len(images), generator=rng)
    chosen = [order[images.labels[order] == label][: int(wanted_Y[label])] for label in range(classes)]
    return images.subset(torch.cat(chosen)[torch.randperm(sum(map(len, chosen)), generator=rng)][:number])


def averaged(powers: list[Power]) -> dict[str, float]:
    return {"auc": mean(each.auc for each in powers), "found": mean(each.found for each in powers)}


def of_runs(_: str, seeds: list[int]) -> Iterator[Cell]:
    """Of scikit-learn's digits: no folder is needed."""
    for seed in seeds:
        for epsilon in (0.0, *BUDGETS):
            for mode in ("sparse", "dense") if not epsilon else ("sparse",):
                key = {"seed": seed, "inversion": mode, "epsilon": epsilon}
                yield key, partial(one_run, seed, mode, epsilon)


def one_run(seed: int, mode: str, epsilon: float) -> dict[str, Any]:
    flat = {"seed": seed, "inversion.mode": mode, "threads": 1}
    flat |= PRIVATE | SMALL | {"privacy.epsilon": epsilon} if epsilon else {}
    with tempfile.TemporaryDirectory() as scratch:
        config = Config.from_flat(flat | {"out-dir": scratch}, Config.from_file(CONFIGS / "digits.toml"))
        return attacked(Run(pipeline.run(config, "run").path))


def attacked(run: Run) -> dict[str, Any]:
    """A run's student and images: members are what clients have trained on, the others the test images."""
    model, data = run.config.model, load(run.config.data, run.config.model)
    images = Images(
        *(torch.cat([getattr(data.train, part), getattr(data.test, part)]) for part in ("pixels", "labels"))
    )
    member_N, labels_N = torch.arange(len(images)) < len(data.train), images.labels
    logits = scores_of(run.model(), images, model, CPU)
    hits_N = (logits.argmax(1) == labels_N).double()
    kept = run.images()
    start = vit_of(model, initial_weights(model, run.config.seed)).eval()
    seen = {
        "pixels": (prepare(images.pixels, model).flatten(1), kept["images"].flatten(1)),
        "features": (frozen_features(start, images, model, CPU), features_of(start, kept["images"])),
    }
    found: dict[str, Any] = {
        "own": 100 * hits_N[member_N].mean().item(),
        "others": 100 * hits_N[~member_N].mean().item(),
    }
    found["loss"] = averaged([power(confidence(logits, labels_N), member_N)])
    draw = stream(run.config.seed, "attack")
    for name, (real_NF, synthetic_MF) in seen.items():
        scores, back, closer = torch.empty(len(images), dtype=torch.float64), [], []
        for label in labels_N.unique():
            own_N, made_M = labels_N == label, kept["targets"] == label
            scores[own_N] = -nearest(real_NF[own_N], synthetic_MF[made_M]).double()
            unseen = real_NF[own_N & ~member_N]
            members = real_NF[own_N & member_N]
            for _ in range(DRAWS):
                some = members[torch.randperm(len(members), generator=draw)[: len(unseen)]]
                back.append(returned(synthetic_MF[made_M], some, unseen))
            others = real_NF[~own_N & ~member_N]
            near, far = (nearest(synthetic_MF[made_M], those).mean().item() for those in (unseen, others))
            closer.append(near / far)
        found[name] = averaged([power(scores, member_N)]) | {"returned": mean(back), "class": mean(closer)}
    return found


@torch.no_grad()
def features_of(start: VisionTransformer, images_MCHW: Tensor) -> Tensor:
    """As `frozen_features`, of images that are normalised already."""
    tapped = taps(start, images_MCHW).double()
    return tapped @ projection(tapped.shape[1])


STUDIES: Mapping[str, Callable[[str, list[int]], Iterator[Cell]]] = {"uploads": of_uploads, "runs": of_runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", default="../shared/data/fashion_mnist", help="Fashion-MNIST's folder")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    with threads(1):
        go_on(arguments.json, STUDIES[arguments.study](arguments.data, list(map(int, arguments.seeds.split(",")))))


if __name__ == "__main__":
    main()

"""How good is what a server phase has made, and what is it compared with?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from .compute import resolve_device
from .config import Config
from .data.images import Images
from .data.shares import server_images
from .evaluation import Evaluation, evaluate
from .inversion.scout import scouted_ensemble
from .methods.contract import Fused
from .training.average import average
from .training.upload import Upload
from .vit.build import vit_of


class Lines(TypedDict):
    """Accuracies in percent of what comparisons are made with."""

    fedavg: float
    local: list[float | None]  # by client; None: no upload


def judge(
    fused: Fused, uploads: Sequence[Upload], config: Config, device: torch.device, known: Lines | None
) -> dict[str, Any]:
    """Accuracy on the server's test images: the result, and the lines it is compared with."""
    images, classes = server_images(config)
    student = evaluate_on(fused.predict, images, config, device)
    ensemble = fused.ensemble if known or fused.ensemble else scouted_ensemble(uploads, config, device)
    return {
        "student": student.accuracy,
        "per_class": dict(zip(classes, student.per_class, strict=True)),
        "confusion": student.confusion,
        **(known or lines(uploads, config)),
        "ensemble": evaluate_on(ensemble, images, config, device).accuracy if ensemble else None,
    }


def lines(uploads: Sequence[Upload], config: Config) -> Lines:
    """What the uploads are without any method: the accuracy in percent of their average and of each one alone."""
    images, _ = server_images(config)
    device = resolve_device(config.device)

    def accuracy(weights: Mapping[str, Tensor]) -> float:
        return evaluate_on(vit_of(config.model, weights), images, config, device).accuracy

    return {
        "fedavg": accuracy(average(uploads)),
        "local": by_client(config, uploads, lambda upload: accuracy(upload.weights)),
    }


def evaluate_on(
    predict: Callable[[Tensor], Tensor], images: Images, config: Config, device: torch.device
) -> Evaluation:
    model = config.model
    if isinstance(predict, torch.nn.Module):
        predict.to(device).eval()
    return evaluate(predict, images, model.img_size, model.num_classes, config.evaluate.batch_size, device)


def by_client(config: Config, uploads: Sequence[Upload], value: Callable[[Upload], Any]) -> list[Any]:
    """A value of each client, None for those without an upload (quorum < 1)."""
    known = {upload.client: value(upload) for upload in uploads}
    return [known.get(client) for client in range(config.partition.clients)]

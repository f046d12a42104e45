"""How good is what a server phase has made, and what is it compared with?"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from .common.compute import resolve_device, return_memory
from .config import Config
from .data.images import Images
from .data.shares import server_images
from .ensemble.ensemble import Ensemble, combine_answers, teacher_weights
from .inversion.scout import scouted_ensemble
from .merging.average import average
from .methods.contract import Fused
from .runs.evaluation import Evaluation, evaluate, graded, scores_of
from .uploads.upload import Upload
from .vit.build import vit_of

log = logging.getLogger("fedmitr")


class Lines(TypedDict):
    """Accuracies in percent of what comparisons are made with."""

    fedavg: float | None  # None: it gives no numbers
    local: list[float | None]  # by client; None: no upload, or as above


def compare(
    student: Evaluation,
    fused: Fused,
    uploads: Sequence[Upload],
    config: Config,
    device: torch.device,
    known: Lines | None,
) -> dict[str, Any]:
    """Accuracy on the server's test images: the result's, and the lines it is compared with."""
    images, classes = server_images(config)
    compared = known or lines(uploads, config)  # before all teachers may have to be in memory
    ensemble: float | None = None
    if fused.ensemble:
        ensemble = _accuracy(evaluate_on(fused.ensemble, images, config, device), "the ensemble")
    elif not known:
        ensemble = _accuracy(ensemble_alone(uploads, images, config, device), "the ensemble")
    return {
        "student": student.accuracy,
        "per_class": dict(zip(classes, student.per_class, strict=True)),
        "confusion": student.confusion,
        **compared,
        "ensemble": ensemble,
    }


def ensemble_alone(uploads: Sequence[Upload], images: Images, config: Config, device: torch.device) -> Evaluation:
    """The ensemble that no method has asked; without weights that need images, one teacher at a time is in memory."""
    if config.ensemble.weights == "estimated":
        return evaluate_on(scouted_ensemble(uploads, config, device), images, config, device)
    settings, classes = config.ensemble, config.model.num_classes
    weights_KY = teacher_weights(uploads, classes, settings.weights)

    def answers(teacher: Upload) -> Tensor:
        return_memory()
        one = Ensemble.of([teacher], config.model, settings).to(device)
        return scores_of(lambda batch: one.answers(batch)[0], images, config.model, device)

    answers_KMY = torch.stack(list(map(answers, uploads)))
    return graded(combine_answers(answers_KMY, weights_KY, settings.combine), images.labels, classes)


def lines(uploads: Sequence[Upload], config: Config) -> Lines:
    """What the uploads are without any method: the accuracy in percent of their average and of each one alone."""
    images, _ = server_images(config)
    device = resolve_device(config.device)

    def accuracy(weights: Mapping[str, Tensor], what: str) -> float | None:
        return_memory()
        return _accuracy(evaluate_on(vit_of(config.model, weights), images, config, device), what)

    return {
        "fedavg": accuracy(average(uploads), "the clients' average"),
        "local": by_client(config, uploads, lambda upload: accuracy(upload.weights, f"client {upload.client}'s model")),
    }


def _accuracy(found: Evaluation, what: str) -> float | None:
    """In percent; None, and a warning, where the answers are no numbers: the accuracy would be that of chance."""
    if math.isfinite(found.loss):
        return found.accuracy
    log.warning("%s has a loss of %s on the test images; its accuracy is left out", what, found.loss)
    return None


def evaluate_on(
    predict: Callable[[Tensor], Tensor], images: Images, config: Config, device: torch.device
) -> Evaluation:
    if isinstance(predict, torch.nn.Module):
        predict.to(device).eval()
    return evaluate(predict, images, config.model, device)


def by_client(config: Config, uploads: Sequence[Upload], value: Callable[[Upload], Any]) -> list[Any]:
    """A value of each client, None for those without an upload (quorum < 1)."""
    known = {upload.client: value(upload) for upload in uploads}
    return [known.get(client) for client in range(config.partition.clients)]

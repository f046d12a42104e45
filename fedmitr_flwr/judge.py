"""How good is what a server phase has made, and what is it compared with?"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor

from .common.compute import resolve_device, return_memory
from .common.progress import Progress
from .common.rng import stream
from .common.workers import Report, Threads, Workers, silent
from .config import Config
from .data.images import Images
from .data.shares import server_images
from .ensemble.ensemble import Ensemble, combine_answers, teacher_weights
from .ensemble.teachers import Teachers
from .inversion.scout import scouted_ensemble
from .merging.average import average
from .methods.contract import Fused
from .runs.evaluation import Evaluation, evaluate, graded, scores_of
from .uploads.upload import Upload
from .vit.build import vit_of

GLIMPSE = 500  # images that a student is shown while it learns
ROOM = 2**28  # bytes of all clients' answers at once; where they are more, the ensemble is asked on its own

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
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Accuracy on the server's test images: the result's, and the lines it is compared with."""
    images, classes = server_images(config)
    ensemble = fused.ensemble
    scores: Evaluation | None = None
    if known is None:  # what each client answers is asked once, before all teachers may have to be in memory
        answers: Iterable[Tensor] = answers_of(uploads, images, config, device, workers)
        few = 4 * len(uploads) * len(images) * config.model.num_classes <= ROOM
        kept_KMY = torch.stack(list(answers)) if few else None
        known = _lines(answers if kept_KMY is None else kept_KMY, uploads, images, config, device)
        weights_KY = ensemble.weights.cpu() if ensemble else weights_alone(uploads, config, device)
        if kept_KMY is not None:
            scores = together(kept_KMY, weights_KY, images, config)
        elif not ensemble:
            ensemble = Ensemble(Teachers.of(uploads, config.model), weights_KY, config.ensemble.combine)
    if ensemble and not scores:
        scores = evaluate_on(ensemble, images, config, device)
    return {
        "student": student.accuracy,
        "per_class": dict(zip(classes, student.per_class, strict=True)),
        "confusion": student.confusion,
        "calibration": student.calibration,
        **known,
        "ensemble": _accuracy(scores, "the ensemble") if scores else None,
    }


def answers_of(
    uploads: Sequence[Upload], images: Images, config: Config, device: torch.device, workers: Workers | None = None
) -> Iterator[Tensor]:
    """What each upload answers alone (M, Y), on the CPU; one network at a time is in a process's memory."""
    return_memory()
    task = partial(_answers, images, config, device)
    with Progress("evaluation", len(uploads), "models") as progress:
        for _, answers in (workers or Threads()).in_order(task, uploads):
            yield answers
            progress.update()


def _answers(images: Images, config: Config, device: torch.device, upload: Upload, _: Report = silent) -> Tensor:
    answers = scores_of(vit_of(config.model, upload.weights).to(device).eval(), images, config.model, device)
    return_memory(cycles=False)  # a network is in none
    return answers


def weights_alone(uploads: Sequence[Upload], config: Config, device: torch.device) -> Tensor:
    """The teachers' weights (K, Y) in an ensemble that no method has asked."""
    if config.ensemble.weights == "estimated":
        return scouted_ensemble(uploads, config, device).weights.cpu()
    return teacher_weights(uploads, config.model.num_classes, config.ensemble.weights)


def together(answers_KMY: Tensor, weights_KY: Tensor, images: Images, config: Config) -> Evaluation:
    """How good the ensemble of these answers is."""
    scores_MY = combine_answers(answers_KMY, weights_KY, config.ensemble.combine)
    return graded(scores_MY, images.labels, config.model.num_classes)


def lines(uploads: Sequence[Upload], config: Config) -> Lines:
    """What the uploads are without any method: the accuracy in percent of their average and of each one alone."""
    images, _ = server_images(config)
    device = resolve_device(config.device)
    return _lines(answers_of(uploads, images, config, device), uploads, images, config, device)


def _lines(
    answers_KMY: Iterable[Tensor], uploads: Sequence[Upload], images: Images, config: Config, device: torch.device
) -> Lines:
    alone = {
        upload.client: _accuracy(
            graded(answers, images.labels, config.model.num_classes), f"client {upload.client}'s model"
        )
        for upload, answers in zip(uploads, answers_KMY, strict=True)
    }
    fedavg = evaluate_on(vit_of(config.model, average(uploads)), images, config, device)
    return {
        "fedavg": _accuracy(fedavg, "the clients' average"),
        "local": by_client(config, uploads, lambda upload: alone[upload.client]),
    }


def _accuracy(found: Evaluation, what: str) -> float | None:
    """In percent; None, and a warning, where the answers are no numbers: the accuracy would be that of chance."""
    if math.isfinite(found.loss):
        return found.accuracy
    log.warning("%s has a loss of %s on the test images; its accuracy is left out", what, found.loss)
    return None


def glimpse(config: Config, device: torch.device) -> Callable[[torch.nn.Module], float]:
    """What says a student's accuracy in percent while it learns, on `GLIMPSE` of the images; nothing goes by it."""
    images = server_images(config)[0]
    few = images.subset(torch.randperm(len(images), generator=stream(config.seed, "glimpse"))[:GLIMPSE])
    return lambda student: evaluate_on(student, few, config, device).accuracy


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

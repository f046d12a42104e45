"""Strange uploads, by what they answer: a model that calls the classes by other names, or that sees nothing.

Synthetic images are made by the other teachers, a fold of the clients left out at a time; who was left out answers. A
client that lacks classes gives the names that it knows to images of others, but what it knows it calls by its name.
Permuted labels call it by another one, and no fewer images [M]. Who was not trained is sure of nothing, where even a
client that lacks most classes is sure of those it has; and it answers every image alike, as else only a client of one
class does, who is sure of that. Where `local.outliers` has taught that client to be sure of nothing but its class, its
own images tell: it can be led to no other name, and who was not trained to any alike [M].

Shapes: M images, Y classes, C answers (as many).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from ..common.progress import Progress
from ..common.rng import stream
from ..common.workers import Report, Threads, Workers, silent
from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..inversion.scout import quick_images
from ..uploads.upload import Upload
from .findings import Finding

log = logging.getLogger("fedmitr")

FOLDS = 5
IMAGES = 5  # made for each class, with an eighth of the default inversion's steps (docs/adr/0017-screening.md)
FEWEST = 5  # uploads: images by one or two others have too much of their own
SUSPECT = 0.5  # of `Names.kept`: below it a client is judged again, by all others
STRANGE = 0.3
INFORMED = 0.18  # of `Names.gain`: below it a model says too little about any class to be judged
UNSURE = 0.9  # of the clients' median of `Names.sure`
ALIKE = 0.35  # of the clients' median of `Names.information`
ANY = 0.6  # of `_led`: a model below it can be led to some names only, and has learned these


@dataclass(frozen=True)
class Names:
    """How a model's answers fit the classes that images were made for."""

    right: float  # mean probability of the class
    chance: float  # what answers as frequent would be right by chance
    best: float  # `right`, if the model's names were exchanged among each other for the best
    sure: float  # mean probability of whatever class is the likeliest, less that of an even guess
    information: float  # mutual, of image and answer, in nats: entropy of the mean answer, less the answers' mean one

    @property
    def gain(self) -> float:
        """How much the model sees of the classes, by whatever names."""
        return self.best - self.chance

    @property
    def kept(self) -> float:
        """The share of it that it calls by the right names."""
        return (self.right - self.chance) / self.gain if self.gain > 0 else 1.0

    @classmethod
    def of(cls, probabilities_MC: Tensor, targets_M: Tensor, shares_M: Tensor | None = None) -> "Names":
        """Of answers (M, C) to images of classes (M,), which count alike or by shares (M,) of a sum of 1."""
        from scipy.optimize import linear_sum_assignment  # here: 30 MB that a run without screening does not need

        classes = probabilities_MC.shape[1]
        weighted_MC = probabilities_MC.double() * (1 / len(targets_M) if shares_M is None else shares_M[:, None])
        share_YC = torch.zeros(classes, classes, dtype=torch.float64, device=targets_M.device)
        share_YC = share_YC.index_add_(0, targets_M, weighted_MC)
        chance = (share_YC.sum(1) * share_YC.sum(0)).sum().item()
        rows, names = linear_sum_assignment(share_YC.cpu().numpy(), maximize=True)
        sure = probabilities_MC.max(1).values.mean().item() - 1 / classes
        entropy, of_mean = (torch.special.entr(each).sum(-1) for each in (probabilities_MC, probabilities_MC.mean(0)))
        information = (of_mean - entropy.mean()).item()
        return cls(share_YC.diag().sum().item(), chance, share_YC[rows, names].sum().item(), sure, information)


def strange_answers(
    uploads: Sequence[Upload],
    config: Config,
    device: torch.device,
    images: int = IMAGES,
    workers: Workers | None = None,
) -> list[Finding]:
    """Of uploads that are not strange otherwise: who is sure of nothing, and who knows the classes by wrong names.

    Two looks: with `FOLDS` folds, which is cheap, and, at those whose names are suspect, with twice the images by all
    others. `images` are made for each class.
    """
    if len(uploads) < FEWEST:
        return []
    folds = min(FOLDS, len(uploads))
    first: list[tuple[Upload, Names]] = []
    task = partial(_judged, uploads, images, config, device)
    each = [(range(fold, len(uploads), folds), fold) for fold in range(folds)]
    with Progress("screening", len(uploads), "clients") as progress:
        for (places, _), judged in (workers or Threads()).in_order(task, each):
            first += zip([uploads[place] for place in places], judged, strict=True)
            progress.update(len(places))
    found = [finding for upload, finding in _unsure(first) if _led(upload, images, config, device) > ANY]
    unsure = {finding.client for finding in found}
    for upload, names in first:
        if upload.client not in unsure and names.gain > INFORMED and names.kept < SUSPECT:
            place = next(place for place, one in enumerate(uploads) if one is upload)
            (again,) = _judged(uploads, 2 * images, config, device, ([place], folds + upload.client))
            found += _misnamed(upload, again)
    return found


def _unsure(answers: Sequence[tuple[Upload, Names]]) -> Iterator[tuple[Upload, Finding]]:
    sure = median(names.sure for _, names in answers)
    usual = median(names.information for _, names in answers)
    for upload, names in answers:
        if names.sure < UNSURE * sure and names.information < ALIKE * usual:
            text = (
                f"it answers all images nearly alike and is sure of none ({names.information:.2f} nats an image, the "
                f"median is {usual:.2f}): was it trained at all?"
            )
            yield upload, Finding(upload.client, "unsure", names.information, text)


def _led(upload: Upload, images_per_class: int, config: Config, device: torch.device) -> float:
    """How far a model can be led to every class: 1 as far to each, 1/Y to one only.

    Images are made for each class by the model alone; of the probability that it gives the class, less that of a
    guess, the mean over classes as a share of the highest.
    """
    rng = stream(config.seed, "screening", "alone", upload.client)
    alone = _ensemble([upload], config).to(device)
    pool = quick_images(alone, config, images_per_class, rng)
    (answers_MC,) = alone.probabilities(pool.images)
    right_M = answers_MC.gather(1, pool.targets[:, None]).squeeze(1)
    classes = config.model.num_classes
    above_Y = torch.stack([right_M[pool.targets == label].mean() for label in range(classes)]) - 1 / classes
    return (above_Y.mean() / above_Y.max().clamp_min(1e-6)).item()


def _misnamed(upload: Upload, names: Names) -> Iterator[Finding]:
    log.info("screening: client %d calls %.0f %% of what it sees by its name", upload.client, 100 * names.kept)
    if names.gain > INFORMED and names.kept < STRANGE:
        text = (
            f"it sees the classes in the others' images, but calls only {100 * max(0.0, names.kept):.0f} % of what "
            "it sees by its name: permuted labels? compare its class list with the others'"
        )
        yield Finding(upload.client, "answers", names.kept, text)


def _judged(
    uploads: Sequence[Upload],
    images_per_class: int,
    config: Config,
    device: torch.device,
    left_out: tuple[Sequence[int], int],
    _: Report = silent,
) -> list[Names]:
    """Let the others make images; what those who were left out call them.

    `left_out` are their places in `uploads`, and the number of a random stream.
    """
    places, number = left_out
    others = [upload for place, upload in enumerate(uploads) if place not in places]
    makers, rng = _ensemble(others, config).to(device), stream(config.seed, "screening", number)
    pool = quick_images(makers, config, images_per_class, rng)
    answers_KMC = _ensemble([uploads[place] for place in places], config).to(device).probabilities(pool.images)
    return [Names.of(answers_MC, pool.targets) for answers_MC in answers_KMC]


def _ensemble(uploads: Sequence[Upload], config: Config) -> Ensemble:
    """Equally weighted: what a client says of its size shall not make it a judge."""
    return Ensemble.of(uploads, config.model, replace(config.ensemble, weights="uniform"))

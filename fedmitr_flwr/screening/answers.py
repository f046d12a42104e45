"""Strange uploads, by what they answer: a model that sees the classes and calls them by other names.

Synthetic images are made by the other teachers, a fold of the clients left out at a time; who was left out answers. A
client that lacks classes gives the names that it knows to images of others, but what it knows it calls by its name.
Permuted labels call it by another one, and no fewer images [M].

Shapes: M images, Y classes, C answers (as many).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..config import Config
from ..inversion.invert import invert
from ..rng import stream
from ..training.upload import Upload
from ..vit.ensemble import Ensemble
from .findings import Finding

log = logging.getLogger("fedmitr")

FOLDS = 5
STEPS = 20
FEWEST = 5  # uploads: images by one or two others have too much of their own
SUSPECT = 0.5  # of `Names.kept`: below it a client is judged again, by all others
STRANGE = 0.3
INFORMED = 0.18  # of `Names.gain`: below it a model says too little about any class to be judged


@dataclass(frozen=True)
class Names:
    """How a model's answers fit the classes that images were made for.

    Attributes:
        right: mean probability of the class.
        chance: what answers as frequent would be right by chance.
        best: `right`, if the model's names were exchanged among each other for the best.
    """

    right: float
    chance: float
    best: float

    @property
    def gain(self) -> float:
        """How much the model sees of the classes, by whatever names."""
        return self.best - self.chance

    @property
    def kept(self) -> float:
        """The share of it that it calls by the right names."""
        return (self.right - self.chance) / self.gain if self.gain > 0 else 1.0

    @classmethod
    def of(cls, probabilities_MC: Tensor, targets_M: Tensor) -> "Names":
        classes = probabilities_MC.shape[1]
        share_YC = torch.zeros(classes, classes, dtype=torch.float64, device=targets_M.device)
        share_YC = share_YC.index_add_(0, targets_M, probabilities_MC.double()) / len(targets_M)
        chance = (share_YC.sum(1) * share_YC.sum(0)).sum().item()
        rows, names = linear_sum_assignment(share_YC.cpu().numpy(), maximize=True)
        return cls(share_YC.diag().sum().item(), chance, share_YC[rows, names].sum().item())


def strange_answers(uploads: Sequence[Upload], config: Config, device: torch.device) -> list[Finding]:
    """Of uploads that are not strange otherwise: who knows the classes by wrong names.

    Two looks: with `FOLDS` folds, which is cheap, and, at those who are suspect, with twice the images by all others.
    """
    if len(uploads) < FEWEST:
        return []
    folds = min(FOLDS, len(uploads))
    suspects = [
        upload
        for fold in range(folds)
        for upload, names in _judged(uploads[fold::folds], uploads, config.screen.images, config, device, fold)
        if names.gain > INFORMED and names.kept < SUSPECT
    ]
    found = []
    for upload in suspects:
        ((_, names),) = _judged([upload], uploads, 2 * config.screen.images, config, device, folds + upload.client)
        log.info("screening: client %d calls %.0f %% of what it sees by its name", upload.client, 100 * names.kept)
        if names.gain > INFORMED and names.kept < STRANGE:
            text = (
                f"it sees the classes in the others' images, but calls only {100 * max(0.0, names.kept):.0f} % of what "
                "it sees by its name: permuted labels? compare its class list with the others'"
            )
            found.append(Finding(upload.client, "answers", names.kept, text))
    return found


def _judged(
    left_out: Sequence[Upload],
    uploads: Sequence[Upload],
    images_per_class: int,
    config: Config,
    device: torch.device,
    number: int,
) -> Iterator[tuple[Upload, Names]]:
    """Let the others make images; what those who were left out call them."""
    clients = {upload.client for upload in left_out}
    others = [upload for upload in uploads if upload.client not in clients]
    targets = torch.arange(config.model.num_classes).repeat(images_per_class)
    settings = replace(config.inversion, mode="dense", steps=STEPS, route=0.0)
    makers = _ensemble(others, config).to(device)
    rng = stream(config.seed, "screening", number)
    images = [
        invert(makers, chunk, settings, config.model, flip=config.data.flip, rng=rng).images
        for chunk in targets.split(config.inversion.batch_size)
    ]
    answers_KMC = _ensemble(left_out, config).to(device).probabilities(torch.cat(images))
    for upload, answers_MC in zip(left_out, answers_KMC, strict=True):
        yield upload, Names.of(answers_MC, targets.to(answers_MC.device))


def _ensemble(uploads: Sequence[Upload], config: Config) -> Ensemble:
    """Equally weighted: what a client says of its size shall not make it a judge."""
    return Ensemble.of(uploads, config.model, replace(config.ensemble, weights="uniform"))

"""The ensemble as the settings want it; where its weights come from images, from first ones, few and rough.

Shapes: K teachers, M images, Y classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..common.progress import Progress
from ..common.rng import stream
from ..config import Config
from ..ensemble.competence import estimate
from ..ensemble.ensemble import Ensemble
from ..uploads.upload import Upload
from .invert import PIXELS, Pixels, invert
from .pool import Pool, join

# 100 images of 20 steps weighed the teachers nearly as well as 250 of 60 (docs/LOG.md).
IMAGES_PER_CLASS = 10
STEPS = 20


def scouted_ensemble(uploads: Sequence[Upload], config: Config, device: torch.device) -> Ensemble:
    """All teachers, weighted by `config.ensemble.weights`; weights that need images are as scouting found them."""
    weigher = Weigher(uploads, config, device)
    weigher.scout()
    return weigher.ensemble


class Weigher:
    """The ensemble, whose weights are estimated anew from ever more images where `ensemble.weights` is "estimated"."""

    def __init__(
        self, uploads: Sequence[Upload], config: Config, device: torch.device, *, teach: str | None = None
    ) -> None:
        """The ensemble teaches by `teach`; None: as fits the student's start. Without images it is weighted by size."""
        self.uploads, self.config = uploads, config
        self.estimates = config.ensemble.weights == "estimated"
        self.ensemble = Ensemble.of(uploads, config.model, config.ensemble, teach or config.distill.teach).to(device)

    def scout(self, pixels: Pixels = PIXELS) -> None:
        """Make the first images, and weigh by them."""
        if self.estimates:
            self.refine(*first_images(self.ensemble, self.config, pixels))

    def refine(self, images_MCHW: Tensor, targets_M: Tensor) -> None:
        """Weigh by all images that were made so far, and by the classes that they were made for."""
        if self.estimates:
            sizes_K = torch.tensor([float(upload.num_examples) for upload in self.uploads]).to(images_MCHW)
            self.ensemble.weights = estimate(self.ensemble.probabilities(images_MCHW), sizes_K, targets_M)


def first_images(ensemble: Ensemble, config: Config, pixels: Pixels = PIXELS) -> tuple[Tensor, Tensor]:
    """Images (M, C, S, S) and the classes (M,) that they were made for."""
    total = STEPS * IMAGES_PER_CLASS * config.model.num_classes
    with Progress("scouting", total, "image steps") as progress:
        rng = stream(config.seed, "scouting")
        pool = quick_images(ensemble, config, IMAGES_PER_CLASS, rng, pixels, progress).require_finite()
    return pool.images, pool.targets


def quick_images(
    ensemble: Ensemble,
    config: Config,
    per_class: int,
    rng: torch.Generator,
    pixels: Pixels = PIXELS,
    progress: Progress | None = None,
) -> Pool:
    """So many images of each class, whole and of few steps, on which all teachers have a say."""
    targets = torch.arange(config.model.num_classes).repeat(per_class)
    settings = replace(config.inversion, mode="dense", steps=STEPS, route=0.0)

    def made(chunk: Tensor) -> Pool:
        def on_step(loss: float, _: float) -> None:
            if progress:
                progress.update(len(chunk), loss=loss)

        how = settings, config.model, pixels
        return invert(ensemble, chunk, *how, flip=config.data.flips, rng=rng, on_step=on_step)

    return join([made(chunk) for chunk in targets.split(config.inversion.batch_size)])

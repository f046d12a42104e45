"""The ensemble as the settings want it; where its weights come from images, from first ones, few and rough.

Shapes: K teachers, M images, Y classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..common.rng import stream
from ..config import Config
from ..ensemble.competence import estimate
from ..ensemble.ensemble import Ensemble
from ..ensemble.learned import learn
from ..merging.closed_form import teachers_of
from ..uploads.upload import Upload
from .invert import PIXELS, Pixels, invert

# 100 images of 20 steps weighed the teachers nearly as well as 250 of 60 (docs/LOG.md).
IMAGES_PER_CLASS = 10
STEPS = 20

FROM_IMAGES = ("estimated", "learned")  # weights that cannot be had without images


def scouted_ensemble(uploads: Sequence[Upload], config: Config, device: torch.device) -> Ensemble:
    """All teachers, weighted by `config.ensemble.weights`; weights that need images are as scouting found them."""
    weigher = Weigher(uploads, config, device)
    if weigher.how in FROM_IMAGES:
        weigher.scout()
    return weigher.ensemble


class Weigher:
    """The ensemble, and its weights, better with each round's images: `estimated` anew, `learned` further; others stay.

    Learned weights (Co-Boosting [C]) start from those that the ensemble has, mean over classes.
    """

    def __init__(
        self,
        uploads: Sequence[Upload],
        config: Config,
        device: torch.device,
        *,
        teach: str = "logits",
        learns: bool = False,
    ) -> None:
        """The ensemble teaches by `teach`, but by `probs` beside statistics.

        With `learns` the weights are learned, whatever `config.ensemble.weights` is; it says where from.
        """
        self.teachers, self.config = teachers_of(uploads, config), config
        frozen = len(self.teachers) - len(uploads)  # of statistics: one, or none
        # Its logits are of another scale, next to which others are nothing; its head has learned from class tokens.
        teach = "probs" if frozen else teach
        self.ensemble = Ensemble.of(self.teachers, config.model, config.ensemble, teach, frozen).to(device)
        self.how = "learned" if learns else config.ensemble.weights
        self.learned_K = self.ensemble.weights.mean(1)  # not normalised

    def scout(self, pixels: Pixels = PIXELS) -> None:
        """Make the first images, and weigh by them."""
        self.refine(*first_images(self.ensemble, self.config, pixels), r=0)

    def refine(self, images_MCHW: Tensor, targets_M: Tensor, r: int) -> None:
        """Weigh by all images that were made until round `r` (from 0), and by the classes that they were made for."""
        if self.how == "estimated":
            reweigh(self.ensemble, self.teachers, images_MCHW, targets_M)
        elif self.how == "learned":
            self._learn(images_MCHW, targets_M, r)

    def _learn(self, images_MCHW: Tensor, targets_M: Tensor, r: int) -> None:
        weights, rng = self.ensemble.weights, stream(self.config.seed, "weights", r)
        answers_KMY = self.ensemble.answers(images_MCHW)
        self.learned_K = learn(answers_KMY, targets_M, self.learned_K, self.ensemble.combine, r, rng)
        shares_K1 = (self.learned_K / self.learned_K.sum()).to(weights)[:, None]
        self.ensemble.weights = shares_K1.expand_as(weights).clone()


def first_images(ensemble: Ensemble, config: Config, pixels: Pixels = PIXELS) -> tuple[Tensor, Tensor]:
    """Images (M, C, S, S) and the classes (M,) that they were made for."""
    targets = torch.arange(config.model.num_classes).repeat(IMAGES_PER_CLASS)
    settings = replace(config.inversion, mode="dense", steps=STEPS, route=0.0)
    rng = stream(config.seed, "scouting")
    images = [
        invert(ensemble, chunk, settings, config.model, pixels, flip=config.data.flip, rng=rng).require_finite().images
        for chunk in targets.split(config.inversion.batch_size)
    ]
    return torch.cat(images), targets.to(ensemble.weights.device)


def reweigh(ensemble: Ensemble, uploads: Sequence[Upload], images_MCHW: Tensor, targets_M: Tensor) -> None:
    """Estimate the ensemble's weights anew, from images made for `targets_M`."""
    sizes_K = torch.tensor([float(upload.num_examples) for upload in uploads], device=images_MCHW.device)
    ensemble.weights = estimate(ensemble.probabilities(images_MCHW), sizes_K, targets_M)

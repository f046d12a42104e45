"""The ensemble as the settings want it; where its weights are estimated, from first images, few and rough.

Shapes: K teachers, M images, Y classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from ..rng import stream
from ..training.upload import Upload
from ..vit.competence import estimate
from ..vit.ensemble import Ensemble
from .invert import invert

# 100 images of 20 steps told nearly as much of the teachers as 250 of 60 (docs/adr/0009).
IMAGES_PER_CLASS = 10
STEPS = 20


def scouted_ensemble(uploads: Sequence[Upload], config: Config, device: torch.device) -> Ensemble:
    """All teachers, weighted by `config.ensemble.weights`; `estimated` weights are as scouting found them."""
    ensemble = Ensemble.of(uploads, config.model, config.ensemble).to(device)
    if config.ensemble.weights == "estimated":
        scout(ensemble, uploads, config)
    return ensemble


def scout(ensemble: Ensemble, uploads: Sequence[Upload], config: Config) -> None:
    """Make the first images, and estimate the weights from them."""
    targets = torch.arange(config.model.num_classes).repeat(IMAGES_PER_CLASS)
    settings = replace(config.inversion, mode="dense", steps=STEPS, route=0.0)
    rng = stream(config.seed, "scouting")
    images = [
        invert(ensemble, chunk, settings, config.model, flip=config.data.flip, rng=rng).images
        for chunk in targets.split(config.inversion.batch_size)
    ]
    reweigh(ensemble, uploads, torch.cat(images), targets.to(ensemble.weights.device))


def reweigh(ensemble: Ensemble, uploads: Sequence[Upload], images_MCHW: Tensor, targets_M: Tensor) -> None:
    """Estimate the ensemble's weights anew, from images made for `targets_M`."""
    sizes_K = torch.tensor([float(upload.num_examples) for upload in uploads], device=images_MCHW.device)
    ensemble.weights = estimate(ensemble.probabilities(images_MCHW), sizes_K, targets_M)

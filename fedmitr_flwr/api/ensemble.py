"""K models that answer together, and the settings that fit how they were trained."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..common.compute import resolve_device
from ..common.errors import ConfigError
from ..config import Config
from ..config.recipe import FROM_SCRATCH, WITH_WEIGHTS
from ..inversion.scout import Weigher
from ..uploads.upload import Upload
from .members import Model, members

log = logging.getLogger("fedmitr")

NEAR = 0.25  # distance of two bodies, as a share of their length, below which both were fine-tuned from one model
STRANGE = 0.2  # cosine of two bodies below which they were drawn apart: their average is no start
READ = ("ensemble.", "inversion.", "relabel.", "distill.", "krum.", "threads", "data.flip")  # of models in memory


class Ensemble:
    """K models that answer together.

    Attributes:
        config: all settings, those of the architecture found from the models.
        uploads: the models' weights and sizes.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        model: str | None = None,
        kwargs: Mapping[str, object] | None = None,
        sizes: Sequence[int] | None = None,
        counts: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
        device: str = "auto",
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Read the models; nothing is computed yet. Arguments as `members.members` has them; `settings` by key.

        Raises:
            ModelError: the models do not fit together.
            ConfigError: a setting is unknown, impossible, or nothing that fusing models reads.
        """
        architecture, self.uploads = members(models, model, kwargs, sizes, counts)
        own = {key: value for key, value in (settings or {}).items() if not key.startswith(READ)}
        if own:
            raise ConfigError(f"{min(own)!r} is read by no fusion of trained models; use keys of: {', '.join(READ)}")
        flat: dict[str, object] = {"seed": seed, "device": device, "partition.clients": max(2, len(self.uploads))}
        flat |= _recipe(self.uploads) | ({"upload.extras": "counts"} if counts is not None else {})
        config = replace(Config.from_flat(flat), model=architecture)
        self.config = Config.from_flat(settings or {}, base=config)
        self.device = resolve_device(self.config.device)
        self._weigher: Weigher | None = None

    @property
    def weigher(self) -> Weigher:
        """All models in memory, weighted; where the weights come from images, these are made when first asked for."""
        if self._weigher is None:
            self._weigher = Weigher(self.uploads, self.config, self.device)
            self._weigher.scout()
        return self._weigher

    @property
    def weights(self) -> Tensor:
        """Of each model for each class: (K, Y); each column sums to 1."""
        return self.weigher.ensemble.weights

    def __call__(self, images_BCSS: Tensor) -> Tensor:
        """Scores (B, Y) of normalised images."""
        with torch.no_grad():
            scores: Tensor = self.weigher.ensemble(images_BCSS.to(self.device))
        return scores


def _recipe(uploads: Sequence[Upload]) -> dict[str, object]:
    """The settings that are left to be chosen: fine-tuned models are near each other, and are to be kept near.

    Models that were drawn apart have no common start, so neither has the student.
    """
    apart, alike = [], []
    for one, other in pairwise(map(_body, uploads)):  # linear in the models, two of them in memory
        apart.append(((one - other).norm() / one.norm()).item())
        alike.append(cosine_similarity(one, other, 0).item())
    near = bool(apart) and sum(apart) / len(apart) < NEAR
    # What fine-tuned models were trained from is known to `fuse` alone, and only if it is given.
    recipe = WITH_WEIGHTS | {"distill.init": "classwise"} if near else dict(FROM_SCRATCH)
    said = "fine-tuned from one model" if near else "trained from scratch"
    if alike and sum(alike) / len(alike) < STRANGE:
        recipe["distill.init"], said = "initial", "trained from different starts"
    log.info("the models are taken to be %s", said)
    return {key: value for key, value in recipe.items() if not key.startswith("local.")}


def _body(upload: Upload) -> Tensor:
    """All weights but the head's, as one vector."""
    return torch.cat([tensor.flatten() for name, tensor in upload.weights.items() if not name.startswith("head.")])

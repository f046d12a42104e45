"""Krum (Blanchard et al. 2017) [C]: the one upload that lies nearest to its neighbours."""

import logging
from collections.abc import Sequence

from torch import Tensor

from ..common.errors import ConfigError
from ..config import Config
from ..uploads.updates import gram, squared_distances
from ..uploads.upload import Upload
from .contract import OF_IMAGES, Fused, Job

log = logging.getLogger("fedmitr")

UNREAD = OF_IMAGES


def check_clients(config: Config, clients: int) -> None:
    """Krum needs a neighbour beside the hostile clients and two more."""
    _require(clients, config.krum.hostile)


def fuse(job: Job) -> Fused:
    """The upload with the least score is the global model."""
    chosen = choose(job.uploads, job.config.krum.hostile)
    job.log(stage="krum", client=chosen.client)
    log.info("krum: the upload of client %d", chosen.client)
    return Fused.of_weights(dict(chosen.weights), job)


def choose(uploads: Sequence[Upload], hostile: int) -> Upload:
    """The upload whose K - f - 2 nearest others are nearest, f = `hostile`."""
    _require(len(uploads), hostile)
    scores_K = scores(squared_distances(gram(uploads, uploads[0].weights)), hostile)
    return uploads[int(scores_K.argmin())]


def scores(distances_KK: Tensor, hostile: int) -> Tensor:
    """Of each upload, the sum of the squared distances to its K - f - 2 nearest others: (K,)."""
    nearest_KK = distances_KK.sort(1).values  # the first is the upload itself
    return nearest_KK[:, 1 : len(distances_KK) - hostile - 1].sum(1)


def _require(clients: int, hostile: int) -> None:
    if clients < hostile + 3:
        raise ConfigError(
            f"method = 'krum' with krum.hostile = {hostile} needs {hostile + 3} uploads, not {clients}; "
            "lower krum.hostile, or take another method"
        )

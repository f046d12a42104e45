"""Whose images are whose: a client's own folder, or its share of one data set; and the server's test images."""

from functools import lru_cache

import torch

from ..config import Config
from ..errors import ConfigError
from ..sections import OWN
from .images import DataSet, Images
from .own import Place, load_own, load_own_test
from .partition import Partition, holdout, split
from .sources import load


@lru_cache(maxsize=1)
def parts_of(config: Config) -> Partition:
    """Who holds what of one data set."""
    data = load(config.data, config.model, with_test=False)
    return split(data.train.labels, config.partition, config.model.num_classes, config.seed)


def _world(config: Config) -> tuple[DataSet, Partition]:
    """The data and who holds what; both are cached, since one process serves many clients."""
    with_test = config.evaluate.where == "server"
    return load(config.data, config.model, with_test=with_test), parts_of(config)


def client_images(config: Config, client: int, place: Place | None = None) -> tuple[Images, Images]:
    """The client's images to train on, and those it holds out (none unless evaluate.where = clients).

    Args:
        config: of the run.
        client: whose share it is.
        place: with partition.scheme = "own", where the client has its images.
    """
    if config.partition.scheme == OWN:
        if place is None:
            raise ConfigError("partition.scheme = 'own', but this client has no data-path")
        images = load_own(place, config)
        indices = torch.arange(len(images))
    else:
        data, parts = _world(config)
        images, indices = data.train, parts.indices[client]
    held = indices[:0]
    if config.evaluate.where == "clients":
        indices, held = holdout(indices, config.evaluate.holdout, config.seed, client)
    return images.subset(indices), images.subset(held)


def server_images(config: Config) -> tuple[Images, tuple[str, ...]]:
    """What the server evaluates on, and the names of the classes."""
    if config.partition.scheme == OWN:
        return load_own_test(config.data, config.model), config.data.class_names
    data, _ = _world(config)
    return data.test, data.classes

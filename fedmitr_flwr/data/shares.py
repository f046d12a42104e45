"""Whose images are whose: a client's own folder, or its share of one data set; and the server's test images."""

import logging
from functools import lru_cache

import torch

from ..common.errors import ConfigError, UserError, say_once
from ..config import Config
from ..config.sections import OWN
from .images import Images
from .own import Place, load_own, load_own_test
from .partition import Partition, holdout, split
from .sources import load, load_test, open_split, training_labels

log = logging.getLogger("fedmitr")


@lru_cache(maxsize=1)
def parts_of(config: Config) -> Partition:
    """Who holds what of one data set; only the labels of the training images are read.

    Raises:
        ConfigError: there is no such partition.
        DataError: the training split is not there, or cannot be read.
    """
    labels = training_labels(config.data, config.model)
    return split(labels, config.partition, config.model.num_classes, config.seed)


def known_parts(config: Config) -> Partition | None:
    """`parts_of`, or None where it cannot be known: for what the server does after the uploads it is not needed."""
    try:
        return parts_of(config)
    except UserError as error:
        log.warning("who held which images is left out of the result: %s", error)
        return None


def client_images(config: Config, client: int, place: Place | None = None) -> tuple[Images, Images]:
    """The client's images to train on, and those it holds out (none unless evaluate.where = clients).

    With partition.scheme = "own" they are in its own `place`.
    """
    if config.partition.scheme == OWN:
        if place is None:
            raise ConfigError("partition.scheme = 'own', but this client has no data-path")
        images = load_own(place, config)
        indices = torch.arange(len(images))
    else:
        images = load(config.data, config.model, with_test=False).train
        indices = parts_of(config).indices[client]
    held = indices[:0]
    if config.evaluate.where == "clients":
        indices, held = holdout(indices, config.evaluate.holdout, config.seed, client)
    return images.subset(indices), images.subset(held)


def class_names(config: Config) -> tuple[str, ...]:
    """The names of the classes, in order; numbers where neither the settings nor the data here have any."""
    names: tuple[str, ...] | None = config.data.class_names
    if config.evaluate.where == "server":
        return server_images(config)[1]
    if not names and config.partition.scheme != OWN and config.data.source != "hub":  # which would be fetched
        try:  # a server of clients that judge for themselves may have no data
            names = open_split(config.data, "train").classes
        except UserError as error:
            say_once(f"the classes have numbers for names: {error}")
    return names or tuple(map(str, range(config.model.num_classes)))


def server_images(config: Config) -> tuple[Images, tuple[str, ...]]:
    """What the server evaluates on, and the names of the classes. Neither clients' images nor their shares are read."""
    if config.partition.scheme == OWN:
        return load_own_test(config.data, config.model), config.data.class_names
    return load_test(config.data, config.model)

"""Which client holds which images: flwr-datasets' partitioners, run on the labels alone.

Letters: n images, K clients, Y classes.
"""

import hashlib
import logging
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..common.rng import derive, stream
from ..config import PartitionConfig

if TYPE_CHECKING:  # with pandas, two CPU seconds, which are imported where images are dealt out
    from .flower_datasets import Partitioner

log = logging.getLogger("fedmitr")


@dataclass(frozen=True, eq=False)
class Partition:
    indices: tuple[Tensor, ...]  # by client: int64, rising
    counts: Tensor  # (K, Y) int64: images by client and class

    @cached_property
    def sha256(self) -> str:
        """Over the index lists, so that two runs can show that they trained on the same shares."""
        digest = hashlib.sha256()
        for indices in self.indices:
            digest.update(len(indices).to_bytes(8, "little"))
            digest.update(indices.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def split(labels: Tensor, config: PartitionConfig, num_classes: int, seed: int) -> Partition:
    """Give every one of `config.clients` clients its images; no image goes to two clients.

    dirichlet and iid give out every image. classes-per-client gives client k the classes k c .. k c + c - 1 of a
    shuffled list that repeats, so that K c >= Y covers every class; otherwise the rest stays unused and is logged.

    Labels are (n,) int64, in 0..num_classes-1. Equal seeds give equal partitions.

    Raises:
        ConfigError: there is no such partition.
    """
    _check_possible(labels, config)
    # The partitioners cut each class in row order; a shuffled order makes the choice of images random too.
    order = torch.randperm(len(labels), generator=stream(seed, "partition", "rows"))
    try:
        shares = _SCHEMES[config.scheme](labels[order], config, seed)
    except ValueError as error:
        raise _impossible(config, str(error).split(". ")[0]) from error
    indices = tuple(order[share].sort().values for share in shares)
    smallest = min(range(len(indices)), key=lambda client: len(indices[client]))
    if len(indices[smallest]) < config.min_size:
        raise _impossible(config, f"client {smallest} would get {len(indices[smallest])} images")
    return Partition(indices, torch.stack([torch.bincount(labels[part], minlength=num_classes) for part in indices]))


def holdout(indices: Tensor, share: float, seed: int, client: int) -> tuple[Tensor, Tensor]:
    """Split a client's indices into a training and a held-out part, each rising and with at least one image.

    Raises:
        ConfigError: the client has fewer than two images.
    """
    if len(indices) < 2:
        raise ConfigError(
            f"client {client} has too few images ({len(indices)}) to hold one out; set partition.min-size = 2"
        )
    held = min(max(1, round(share * len(indices))), len(indices) - 1)
    shuffled = indices[torch.randperm(len(indices), generator=stream(seed, "holdout", client))]
    return shuffled[held:].sort().values, shuffled[:held].sort().values


def _check_possible(labels: Tensor, config: PartitionConfig) -> None:
    """What needs no draw to be seen; the library's own messages do not name our settings."""
    needed, there = config.clients * config.min_size, len(labels)
    if needed > there:
        raise ConfigError(
            f"{config.clients} clients with partition.min-size = {config.min_size} need {needed} images, but there "
            f"are {there}; lower partition.min-size or the number of clients, or raise data.train-limit"
        )
    present = len(_present(labels))
    if config.scheme == "classes-per-client" and config.classes_per_client > present:
        raise ConfigError(
            f"partition.classes-per-client = {config.classes_per_client}, but the training images are of {present} "
            f"classes; use at most {present}"
        )


def _present(labels: Tensor) -> Tensor:
    """The classes that have an image, rising."""
    return torch.bincount(labels).nonzero().flatten()


def _impossible(config: PartitionConfig, reason: str) -> ConfigError:
    setting, fix = {
        "dirichlet": (f"partition.alpha = {config.alpha:g}", "raise partition.alpha, try another seed, or lower"),
        "classes-per-client": (f"partition.classes-per-client = {config.classes_per_client}", "lower that,"),
        "iid": ("partition.scheme = 'iid'", "lower"),
    }[config.scheme]
    return ConfigError(
        f"no partition for {config.clients} clients with {setting} and partition.min-size = {config.min_size} "
        f"({reason}); {fix} partition.min-size or the number of clients"
    )


def _dirichlet(labels: Tensor, config: PartitionConfig, seed: int) -> list[Tensor]:
    from .flower_datasets import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=config.clients,
        partition_by="label",
        alpha=config.alpha,
        min_partition_size=config.min_size,
        self_balancing=False,
        shuffle=False,
        seed=derive(seed, "partition", "dirichlet"),
    )
    return _shares(partitioner, labels, config.clients)


def _classes_per_client(labels: Tensor, config: PartitionConfig, seed: int) -> list[Tensor]:
    """One part per client and class, dealt round the shuffled classes.

    None of the partitioner's own modes covers every class whenever K c >= Y does ("deterministic" gives client k the
    classes k .. k + c - 1, so 5 clients of 2 classes leave 4 of 10 classes out). K c parts of one class each do.
    """
    from .flower_datasets import PathologicalPartitioner

    present = _present(labels)
    places = torch.searchsorted(present, labels)
    shuffled = torch.randperm(len(present), generator=stream(seed, "partition", "classes"))
    size = config.classes_per_client
    parts = config.clients * size
    partitioner = PathologicalPartitioner(
        num_partitions=parts,
        partition_by="label",
        num_classes_per_partition=1,
        class_assignment_mode="deterministic",
        shuffle=False,
    )
    if parts < len(present):
        unused = sorted(present[shuffled >= parts].tolist())
        log.warning("no client holds the classes %s: %d clients of %d classes", unused, config.clients, size)
    shares = _shares(partitioner, shuffled[places], parts)
    return [torch.cat(shares[start : start + size]) for start in range(0, parts, size)]


def _iid(labels: Tensor, config: PartitionConfig, seed: int) -> list[Tensor]:  # noqa: ARG001  (the rows are shuffled)
    from .flower_datasets import IidPartitioner

    return _shares(IidPartitioner(num_partitions=config.clients), labels, config.clients)


_SCHEMES = {"dirichlet": _dirichlet, "classes-per-client": _classes_per_client, "iid": _iid}


def _shares(partitioner: "Partitioner", labels: Tensor, parts: int) -> list[Tensor]:
    """The row numbers of every part. The partitioners know data sets only, so the row numbers ride along."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"label": labels.numpy(), "row": torch.arange(len(labels)).numpy()})
    with warnings.catch_warnings():
        # Said again, once and with our settings' names, by ConfigError or by the log.
        warnings.filterwarnings("ignore", message="The specified min_partition_size")
        warnings.filterwarnings("ignore", message=r"Classes: .* will NOT be used")
        return [
            torch.from_numpy(partitioner.load_partition(part).with_format("numpy")["row"][:]) for part in range(parts)
        ]

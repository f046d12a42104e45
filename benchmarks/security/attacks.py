"""What a hostile client uploads in place of its own model, or of its statistics."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.rng import derive, stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.merging.closed_form import statistics_of
from fedmitr_flwr.statistics.moments import Statistics, packed, sent
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import build_vit, initial_weights, vit_of

SCALE = 100
CLAIMED = 1000  # images
SHIFT = 3.0  # of each number of a feature, which are about 1

Attack = Callable[[Upload, Config], Upload]


def scaled(upload: Upload, config: Config) -> Upload:
    """The honest update, a hundred times as long."""
    return _changed(upload, config, lambda start, update: start + SCALE * update)


def reversed_(upload: Upload, config: Config) -> Upload:
    """The honest update with its sign turned."""
    return _changed(upload, config, lambda start, update: start - update)


def random(upload: Upload, config: Config) -> Upload:
    """Fresh weights, drawn as the start was, of another seed."""
    vit = build_vit(config.model, derive(config.seed, "hostile", upload.client))
    return replace(upload, weights=dict(vit.state_dict()))


def permuted(upload: Upload, config: Config) -> Upload:
    """Trained as honestly, on labels that were exchanged for each other at random."""
    images, _ = client_images(config, upload.client)
    names = torch.randperm(config.model.num_classes, generator=stream(config.seed, "permuted", upload.client))
    vit = vit_of(config.model, initial_weights(config.model, config.seed))
    rng = stream(config.seed, "local", 1, upload.client)
    loss = train_local(vit, Images(images.pixels, names[images.labels]), config, rng, torch.device("cpu"))
    return replace(upload, weights=dict(vit.state_dict()), train_loss=loss)


def shifted(upload: Upload, config: Config) -> Upload:
    """Many images are claimed, and the features of each class are moved, each class its own way."""
    told = statistics_of(upload)
    counts_Y = (told.counts * CLAIMED / told.counts.sum()).round()
    number, share = counts_Y.sum(), counts_Y.sum() / told.counts.sum()
    rng = stream(config.seed, "shifted", upload.client)
    moves_YD = SHIFT * torch.randn(told.sums.shape, generator=rng, dtype=torch.float64)
    sums_YD = counts_Y[:, None] * (told.means + moves_YD)
    means_YD = sums_YD / counts_Y.clamp_min(1)[:, None]
    moment_DD = told.scatter * share + means_YD.T @ sums_YD
    changed = _with(upload, Statistics(counts_Y, sums_YD, moment_DD))
    return replace(changed, num_examples=int(number))


def enlarged(upload: Upload, config: Config) -> Upload:
    """Features a hundred times as long, of a truthful number of images."""
    del config
    told = statistics_of(upload)
    return _with(upload, Statistics(told.counts, SCALE * told.sums, SCALE**2 * told.moment))


def exchanged(upload: Upload, config: Config) -> Upload:
    """The counts and sums of the classes, exchanged at random: possible sums, under other names."""
    told = statistics_of(upload)
    names = torch.randperm(len(told.counts), generator=stream(config.seed, "exchanged", upload.client))
    return _with(upload, Statistics(told.counts[names], told.sums[names], told.moment))


def turned(upload: Upload, config: Config) -> Upload:
    """Each feature z as -z, which is as long: pointing the other way."""
    del config
    told = statistics_of(upload)
    return _with(upload, Statistics(told.counts, -told.sums, told.moment))


ATTACKS: dict[str, Attack] = {"scaled": scaled, "reversed": reversed_, "random": random, "permuted": permuted}
LIES: dict[str, Attack] = {"shifted": shifted, "enlarged": enlarged, "exchanged": exchanged, "turned": turned}


def _with(upload: Upload, told: Statistics) -> Upload:
    """The upload with other sums."""
    assert upload.statistics is not None, "which are to be changed"
    statistics = {**upload.statistics, **sent({"sums": told.sums, "moment": packed(told.moment)})}
    return replace(upload, class_counts=tuple(map(int, told.counts.tolist())), statistics=statistics)


def _changed(upload: Upload, config: Config, change: Callable[[Tensor, Tensor], Tensor]) -> Upload:
    start = initial_weights(config.model, config.seed)
    weights = {name: change(start[name], tensor - start[name]) for name, tensor in upload.weights.items()}
    return replace(upload, weights=weights)

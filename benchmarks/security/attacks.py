"""What a hostile client uploads in place of its own model. All of it passes the checks of an upload's form."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.rng import derive, stream
from fedmitr_flwr.training.local import train_local
from fedmitr_flwr.training.upload import Upload
from fedmitr_flwr.vit.build import build_vit, initial_weights, vit_of

SCALE = 100

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


ATTACKS: dict[str, Attack] = {"scaled": scaled, "reversed": reversed_, "random": random, "permuted": permuted}


def _changed(upload: Upload, config: Config, change: Callable[[Tensor, Tensor], Tensor]) -> Upload:
    start = initial_weights(config.model, config.seed)
    weights = {name: change(start[name], tensor - start[name]) for name, tensor in upload.weights.items()}
    return replace(upload, weights=weights)

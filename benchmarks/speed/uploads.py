"""Teachers for the speed benchmark, as upload files: many, different, and each the owner of a few classes.

Letters: K teachers, B targets, Y classes.
"""

from pathlib import Path

import torch
from torch import Tensor

from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import ModelConfig
from fedmitr_flwr.uploads.upload import Upload, save
from fedmitr_flwr.vit.build import Weights, initial_weights

NOISE = 0.01  # of a tensor's root mean square
PER_CLASS = 100  # images that an owner has of a class
DESCRIPTION = (
    f"Copies of the start weights, each moved by normal noise of {NOISE:.0%} of a tensor's root mean square, with a "
    f"random head each. Class counts are made up: a teacher owns {PER_CLASS} images of each of its classes and none of "
    "the others; ensemble.weights = counts."
)


def class_counts(teachers: int, classes: int) -> list[tuple[int, ...]]:
    """Images by teacher and class, K tuples of Y. Each class has an owner, and each teacher at least two classes."""
    owned = min(classes, max(2, -(-classes // teachers)))
    table = []
    for k in range(teachers):
        mine = {(k * classes // teachers + step) % classes for step in range(owned)}
        table.append(tuple(PER_CLASS if y in mine else 0 for y in range(classes)))
    return table


def owned_classes(teachers: int, classes: int) -> str:
    """In words, such as "0 1 2; 2 3 4" for two teachers."""
    return "; ".join(
        " ".join(str(y) for y, count in enumerate(row) if count) for row in class_counts(teachers, classes)
    )


def asked(counts: list[tuple[int, ...]], route: float) -> list[int]:
    """By class, how many teachers are asked about an image of it: with routing its owners, who all weigh the same."""
    owners = [sum(count > 0 for count in column) for column in zip(*counts, strict=True)]
    return owners if route > 0 else [len(counts)] * len(owners)


def draw_targets(count: int, classes: int, rng: torch.Generator) -> Tensor:
    """(B,) classes, all equally often but for a remainder, in random order."""
    offset = torch.randint(classes, (1,), generator=rng)
    return ((torch.arange(count) + offset) % classes)[torch.randperm(count, generator=rng)]


def write_uploads(folder: Path, teachers: int, model: ModelConfig, seed: int) -> list[Path]:
    """Write K upload files."""
    start = initial_weights(model, seed)
    paths = []
    for client, counts in enumerate(class_counts(teachers, model.num_classes)):
        weights = moved(start, stream(seed, "teacher", client))
        path = folder / f"client_{client}.safetensors"
        save(Upload(client, weights, sum(counts), 0.0, fingerprint(), counts), path)
        paths.append(path)
    return paths


def moved(start: Weights, rng: torch.Generator) -> Weights:
    """Another teacher near `start`, with a head of its own: weights of variance 1 / D, biases 0."""
    weights = {}
    for name, tensor in start.items():
        noise = torch.randn(tensor.shape, generator=rng)
        if name == "head.weight":
            weights[name] = noise * tensor.shape[1] ** -0.5
        elif name == "head.bias":
            weights[name] = torch.zeros_like(tensor)
        else:
            weights[name] = tensor + NOISE * tensor.square().mean().sqrt() * noise
    return weights

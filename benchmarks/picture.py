"""Draw the picture of README.md: real images, inverted ones, and these with halted patches blue.

    fedmitr run -c configs/digits.toml --name picture
    python benchmarks/picture.py ~/fedmitr-runs/picture docs/images.png

Of the run's folder it reads pool.safetensors. The real images are scikit-learn's digits, one of each class, as are the
inverted ones.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

mpl.use("Agg")
from matplotlib import pyplot as plt

CLASSES = 10
BLUE, FADED = torch.tensor([0.36, 0.55, 0.95]), 0.6  # as in a run's images.png: halted patches


def first_of_each(labels: Tensor) -> Tensor:
    """Where each class is first."""
    return torch.tensor([int((labels == label).nonzero()[0]) for label in range(CLASSES)])


def alive_pixels(alive: Tensor, side: int) -> Tensor:
    """The mask of patches (M, N) as one of pixels (M, side, side)."""
    grid = int(alive.shape[1] ** 0.5)
    return alive.view(-1, grid, grid).repeat_interleave(side // grid, 1).repeat_interleave(side // grid, 2)


def rows(pool: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(name, images (10, side, side, 3) between 0 and 1) of each row."""
    digits = load_digits()
    real = torch.as_tensor(digits.images)[first_of_each(torch.as_tensor(digits.target))] / 16
    chosen = first_of_each(pool["targets"])
    inverted = (pool["images"][chosen].float().mean(1) / 2 + 0.5).clamp(0, 1)  # normalised by 0.5 and 0.5
    alive = alive_pixels(pool["alive"][chosen], inverted.shape[-1])
    grey = inverted[..., None].expand(-1, -1, -1, 3)
    halted = torch.where(alive[..., None], grey, (1 - FADED) * grey + FADED * BLUE)
    return [("real", real[..., None].expand(-1, -1, -1, 3)), ("inverted", grey), ("halted", halted)]


def main(run: Path, target: Path) -> None:
    drawn = rows(load_file(run / "pool.safetensors"))
    figure, axes = plt.subplots(len(drawn), CLASSES, figsize=(CLASSES, len(drawn) + 0.1), dpi=100)
    for (name, images), line in zip(drawn, axes, strict=True):
        for image, place in zip(images, line, strict=True):
            place.imshow(image.numpy())
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name)
    figure.tight_layout(pad=0.3)
    figure.savefig(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]).expanduser(), Path(sys.argv[2]))

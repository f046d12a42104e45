"""The two pictures of a run: its synthetic images, and which client holds how many images of which class.

Axes: B image, C channel, H, W pixels, N patch (row by row), K client, Y class.
"""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import printable, say_once
from ..common.files import replacing
from ..config import ModelConfig
from ..data.images import to_uint8

if TYPE_CHECKING:  # matplotlib takes a second to import, and what fails before anything is drawn needs none of it
    from matplotlib.figure import Figure

_FADED = 0.3  # how much of a halted patch is left
_FADE_TO = (150, 180, 235)  # the rest: a light blue, since digits are black and white themselves
_LONGEST_NAME = 16  # characters


def save_images(
    images_BCHW: Tensor,
    alive_BN: Tensor,
    targets: Tensor,
    classes: Sequence[str],
    model: ModelConfig,
    path: Path,
    most: int = 40,
) -> None:
    """Draw normalised images under the names of their `targets` (B,), `most` of them, evenly over the classes.

    Patches that are halted, where `alive_BN` is False, are faded.
    """
    order = torch.argsort(targets.cpu(), stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(most, len(order))).round().long()]
    pictures = _fade(to_uint8(images_BCHW[chosen].detach().cpu(), model), alive_BN[chosen].cpu())
    columns = min(10, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = blank(max(1.15 * columns + 0.2, 5.2), 1.3 * rows + 0.5)
    alive = alive_BN.float().mean().item()
    shown = f"{len(chosen)} of {len(order)} synthetic images; {100 * alive:.0f} % of all patches alive"
    figure.suptitle(f"{shown}, halted ones faded to blue", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, target in zip(axes, pictures, targets[chosen].tolist(), strict=False):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_title(_short(classes[target]), fontsize=8, pad=2, parse_math=False)
    save(figure, path)


def _fade(pixels_BCHW: Tensor, alive_BN: Tensor) -> Tensor:
    """uint8 colour pictures whose halted patches (False) are mostly light blue."""
    grid = math.isqrt(alive_BN.shape[1])
    height, width = pixels_BCHW.shape[-2:]
    patches_BGG = alive_BN.reshape(-1, grid, grid)
    rows, columns = torch.arange(height) * grid // height, torch.arange(width) * grid // width
    alive_B1HW = patches_BGG[:, rows][:, :, columns].unsqueeze(1)
    colour = pixels_BCHW.expand(-1, 3, -1, -1)
    faded = _FADED * colour + (1 - _FADED) * torch.tensor(_FADE_TO)[:, None, None]
    return torch.where(alive_B1HW, colour, faded.round().to(torch.uint8))


def save_partition(counts_KY: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw the number of images by client (row) and class (column), with the clients' totals."""
    counts = counts_KY.cpu()
    clients, width = counts.shape
    numbers = width <= 25 and clients <= 40
    side = 0.5 if numbers else 0.16  # inches of one cell
    figure = blank(max(4.5, side * width + 2.8), max(2.4, max(side * 0.7, 0.2) * clients + 1.6))
    axis = figure.subplots()
    shades = axis.imshow(counts.numpy(), cmap="Blues", aspect="auto", vmin=0)
    figure.colorbar(shades, ax=axis, label="images", shrink=0.9)
    names = [_short(name) for name in classes]
    upright = width > 25 or max(map(len, names)) > 4
    axis.set_xticks(range(width), names, rotation=90 if upright else 0, fontsize=8 if numbers else 7, parse_math=False)
    totals = [f"{client}  (n = {int(row.sum())})" for client, row in enumerate(counts)]
    axis.set_yticks(range(clients), totals, fontsize=8)
    axis.set_xlabel("class")
    axis.set_ylabel("client")
    axis.set_title(f"training images of {clients} clients by class", fontsize=10)
    if numbers:
        write_cells(axis, counts.tolist(), counts > counts.max() / 2)
    save(figure, path)


def write_cells(axis: Any, texts: Sequence[Sequence[object]], dark: Any) -> None:
    """A text in each cell of a heat map, white where the truth value of the same place in `dark` says so."""
    for (y, x), is_dark in np.ndenumerate(np.asarray(dark)):
        colour = "white" if is_dark else "black"
        axis.text(x, y, str(texts[y][x]), ha="center", va="center", fontsize=7, color=colour)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def blank(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Whole or not at all; the Agg canvas needs no display and leaves pyplot's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(path) as temporary, glyphs_in_one_line():
        figure.savefig(temporary, format="png", dpi=130)


@contextmanager
def glyphs_in_one_line() -> Iterator[None]:
    """One line for all letters that the font lacks, in place of matplotlib's warning for each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = ""
    for warning in caught:
        if found := re.match(r"Glyph (\d+) ", str(warning.message)):
            missing += chr(int(found[1]))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        say_once(
            f"the pictures show boxes for {''.join(sorted(set(missing)))}, which their font lacks; tables show them"
        )

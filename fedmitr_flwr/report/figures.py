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
    most: int = 30,
) -> None:
    """Draw normalised images under the names of their `targets` (B,), `most` of them, evenly over the classes.

    Below each row stand the same images, whose halted patches, where `alive_BN` is False, are faded.
    """
    chosen = samples(images_BCHW, alive_BN, targets, model, most)
    columns = min(10, len(chosen))
    rows = 2 * math.ceil(len(chosen) / columns)
    figure = blank(max(1.15 * columns + 0.2, 6.6), 1.2 * rows + 0.5)
    alive = alive_BN.float().mean().item()
    shown = f"{len(chosen)} of {len(targets)} synthetic images; {100 * alive:.0f} % of all patches alive"
    figure.suptitle(f"{shown}, in each second row halted ones faded to blue", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flatten():
        axis.set_axis_off()
    for number, (target, *pictures) in enumerate(chosen):
        row, column = divmod(number, columns)
        for below, picture in enumerate(pictures):
            axes[2 * row + below, column].imshow(picture)
        axes[2 * row, column].set_title(_short(classes[target]), fontsize=8, pad=2, parse_math=False)
    save(figure, path)


def samples(
    images_BCHW: Tensor, alive_BN: Tensor, targets: Tensor, model: ModelConfig, most: int
) -> list[tuple[int, "np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]]:
    """Of each chosen image the class, the picture (H, W, 3), and the same with halted patches faded."""
    order = torch.argsort(targets.cpu(), stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(most, len(order))).round().long()]
    pixels = to_uint8(images_BCHW[chosen].detach().cpu(), model).expand(-1, 3, -1, -1)
    pictures, faded = (each.permute(0, 2, 3, 1).numpy() for each in (pixels, _fade(pixels, alive_BN[chosen].cpu())))
    return list(zip(targets[chosen].tolist(), pictures, faded, strict=True))


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
    """Draw `partition` into a file."""
    save(partition(counts_KY.tolist(), classes), path)


def partition(counts_KY: Sequence[Sequence[int]], classes: Sequence[str]) -> "Figure":
    """The number of images by client (row) and class (column), with the clients' totals."""
    totals = [f"{client} (n = {sum(row)})" for client, row in enumerate(counts_KY)]
    numbers = len(classes) <= 25 and len(totals) <= 40
    return heat_map(
        np.array(counts_KY), totals, classes, ("class", "client"), "training images", counts_KY if numbers else None
    )


def heat_map(
    values: "np.ndarray[Any, Any]",
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    title: str,
    texts: Sequence[Sequence[object]] | None,
) -> "Figure":
    """Shades from nothing to a blue on which black and white can be read: it stands on pages of either kind.

    Args:
        values: by row and column; NaN is left empty.
        rows: names, which are drawn as far as there is room.
        columns: likewise.
        labels: of the axis of columns, and of the axis of rows.
        title: what the values are.
        texts: of the cells; None: a bar says what the shades are.
    """
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", [(0.0, 0.45, 0.7, 0.03), (0.0, 0.45, 0.7, 0.75)])
    down, across = values.shape
    side = (0.32, 0.29) if texts is not None else (3.6 / across, min(0.25, 5 / down))
    names = [list(map(_short, each)) for each in (rows, columns)]
    upright = max(map(len, names[1])) > 4 or across > 25
    room = 0.9 + 0.075 * max(map(len, names[0])), 0.9 + (0.075 * max(map(len, names[1])) if upright else 0)
    figure = blank(max(4.4, side[0] * across + room[0] + (0.7 if texts is None else 0)), side[1] * down + room[1])
    axis = figure.subplots()
    drawn = axis.imshow(values, cmap=shades, aspect="auto", vmin=0)
    if texts is None:
        figure.colorbar(drawn, ax=axis, shrink=0.9)
    else:
        for (y, x), value in np.ndenumerate(values):
            if value == value:
                axis.text(x, y, str(texts[y][x]), ha="center", va="center", fontsize=8)
    steps = [max(1, math.ceil(len(each) / 25)) for each in names]
    axis.set_xticks(range(0, across, steps[1]), names[1][:: steps[1]], rotation=90 if upright else 0, parse_math=False)
    axis.set_yticks(range(0, down, steps[0]), names[0][:: steps[0]], parse_math=False)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title, fontsize=10)
    return figure


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
    """As PNG or PDF, whole or not at all; the Agg canvas needs no display and leaves pyplot's global state alone."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    kind = path.suffix.removeprefix(".")
    dated = {"CreationDate": None} if kind == "pdf" else {}  # equal pictures are equal files
    with replacing(path) as temporary, glyphs_in_one_line(), rc_context({"pdf.fonttype": 42}):
        figure.savefig(temporary, format=kind, dpi=130, metadata=dated)


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

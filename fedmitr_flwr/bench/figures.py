"""The pictures of a bench: accuracy and costs by method, and recall by class."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.figures import blank, save, write_cells
from .results import Results
from .rows import Place, Row, places, rows

if TYPE_CHECKING:  # matplotlib takes a second to import, and a grid may be refused
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart.
OURS, OTHERS, FLOWER, GREY = "#D55E00", "#0072B2", "#009E73", "#767676"
COLOURS = {"one-shot": OTHERS, "flower": FLOWER, "reference": GREY}
SCHEMES = ("classes-per-client", "dirichlet", "iid")  # from the most skewed
COSTS = {"bytes_up": ("MB uploaded\nby each client", 1e6), "server_seconds": ("seconds\nof the server", 1.0)}
_TALL, _WIDE = 0.19, 1.9  # inches of a line, and of a panel


def draw(results: Results, folder: Path) -> int:
    """Write all pictures there are data for, as PNG and PDF, and remove those of an earlier grid; how many."""
    found = rows(results)
    folder.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    for data, clients in dict.fromkeys((place.data, place.clients) for place in places(found)):
        own = [row for row in found if (row.place.data, row.place.clients) == (data, clients)]
        made: dict[str, Figure | None] = {"accuracy": dots(own, results.reference, f"{data}, {clients} clients")}
        made |= {f"recall-{_slug(place.partition)}": recall(own, place) for place in places(own)}
        for name, figure in made.items():
            if figure is not None:
                path = folder / f"{_slug(data)}-K{clients}-{name}.png"
                save(figure, path)
                save(figure, path.with_suffix(".pdf"))
                written |= {path, path.with_suffix(".pdf")}
    for path in {*folder.glob("*.png"), *folder.glob("*.pdf")} - written:
        path.unlink()
    return len(written) // 2


def dots(found: Sequence[Row], reference: str, title: str) -> "Figure":
    """Methods as lines, from the best of each kind; a panel for each partition, from the most skewed, and each cost.

    Every point is where its numbers are. Filled: the reference, and what has another method; hollow: its variants.
    """
    method = next((row.entries[0]["method"] for row in found if row.label == reference), reference)
    of_name: dict[str, list[Row]] = {}
    for row in found:
        of_name.setdefault(row.name, []).append(row)
    kinds = tuple(COLOURS)
    mean = {name: sum(row.accuracy.mean for row in own) / len(own) for name, own in of_name.items()}
    order = sorted(of_name, key=lambda name: (kinds.index(of_name[name][0].kind), -mean[name]))
    columns = sorted(places(found), key=lambda place: _skewness(next(row for row in found if row.place == place)))
    costs = [key for key in COSTS if any(row.cost(key) for row in found)]
    figure = blank(1.9 + _WIDE * (len(columns) + len(costs)), 1.1 + _TALL * len(order))
    axes = figure.subplots(1, len(columns) + len(costs), sharey=True, squeeze=False)[0]
    for y, name in enumerate(order):
        first = of_name[name][0]
        colour = COLOURS[first.kind]
        variant = first.kind == "one-shot" and first.entries[0]["method"] == method
        look: dict[str, Any] = {"color": OURS if variant else colour, "marker": "o", "markersize": 4.5}
        look["markerfacecolor"] = "white" if variant and first.label != reference else look["color"]
        for axis, place in zip(axes, columns, strict=False):
            for row in of_name[name]:
                if row.place == place:
                    axis.errorbar(row.accuracy.mean, y, xerr=row.accuracy.std, elinewidth=0.8, **look)
        for axis, key in zip(axes[len(columns) :], costs, strict=True):
            if known := [value for row in of_name[name] if (value := row.cost(key))]:
                axis.plot(sum(known) / len(known) / COSTS[key][1], y, **look)
    for axis, place in zip(axes, columns, strict=False):
        axis.set_title(place.partition, fontsize=9)
        axis.set_xlabel("accuracy, %", fontsize=8)
    for axis, key in zip(axes[len(columns) :], costs, strict=True):
        axis.set_xscale("log")
        axis.set_title(COSTS[key][0], fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(order)), order, parse_math=False)
    axes[0].set_ylim(len(order) - 0.5, -0.5)
    title = f"{title}: mean ± standard deviation over seeds"
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=10)
    return figure


def _skewness(row: Row) -> tuple[int, float]:
    place = row.entries[0]["bench"]
    return SCHEMES.index(place["scheme"]), place["value"] or 0.0


def recall(found: Sequence[Row], place: Place) -> "Figure | None":
    """A heat map of recall: one line for each method, with most rounds, and one column for each class."""
    shown = _longest([row for row in found if row.place == place and row.recall])
    if not shown:
        return None
    classes = list(dict.fromkeys(name for row in shown for name in row.recall))
    numbers = len(classes) <= 25
    figure = blank(2.6 + (0.42 if numbers else 0.16) * len(classes), 1.2 + 0.27 * len(shown))
    axis = figure.subplots()
    grid = np.array([[row.recall.get(name, math.nan) for name in classes] for row in shown])
    shades = axis.imshow(grid, cmap="cividis", aspect="auto", vmin=0, vmax=100)
    figure.colorbar(shades, ax=axis, label="recall, %", shrink=min(1.0, 4 / len(shown)), aspect=12)
    upright = max(map(len, classes)) > 4 or not numbers
    axis.set_xticks(range(len(classes)), classes, rotation=90 if upright else 0, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=8, parse_math=False)
    if numbers:
        texts = [["-" if math.isnan(value) else f"{value:.0f}" for value in line] for line in grid]
        write_cells(axis, texts, grid < 55)
    title = f"{place.data}, {place.clients} clients, {place.partition}: recall by class"
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=10)
    return figure


def _longest(found: Sequence[Row]) -> list[Row]:
    """Of each method the rows with most rounds."""
    most = {row.label: max(other.rounds for other in found if other.label == row.label) for row in found}
    return [row for row in found if row.rounds == most[row.label]]


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in text.lower()).strip("-")

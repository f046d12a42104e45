"""The pictures of a bench: accuracy against bytes, skew and server seconds, and recall by class."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.figures import blank, save, write_cells
from .results import Results
from .rows import Place, Row, places, rows

if TYPE_CHECKING:  # matplotlib takes a second to import, and a grid may be refused
    from matplotlib.figure import Figure

Point = tuple[float, float, float]  # x, mean accuracy, its standard deviation

# Okabe and Ito's colours, which people with any colour vision tell apart; the yellow is too light for points.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OURS = "#D55E00"
GREY = "#767676"
MARKERS = "osDXPv^<>hp"  # 11, so that with 6 colours 66 methods differ; the star is ours
SCHEMES = ("classes-per-client", "dirichlet", "iid")  # from the most skewed
_PANEL = (4.0, 3.1)  # inches
_ACROSS = 3


@dataclass(frozen=True)
class Style:
    """How one method looks in every picture."""

    colour: str
    marker: str
    hollow: bool = False
    line: str = "-"


def draw(results: Results, folder: Path) -> int:
    """Write all pictures there are data for, as PNG, and remove those of an earlier grid; gives their number."""
    found = rows(results)
    folder.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    for data, clients in dict.fromkeys((place.data, place.clients) for place in places(found)):
        own = [row for row in found if (row.place.data, row.place.clients) == (data, clients)]
        looks = styles(own, results.reference)
        title = f"{data}, {clients} clients"
        with_bytes = [row for row in own if not looks[row.label].hollow]  # variants of the reference have its bytes
        up, seconds = "MB uploaded by each client, all rounds", "seconds of the server, without evaluation"
        made: dict[str, Figure | None] = {
            "bytes": scatter(with_bytes, looks, "bytes_up", 1e6, up, title),
            "seconds": scatter(_longest(own), looks, "server_seconds", 1.0, seconds, title),
            "skew": skew(own, looks, title),
        }
        made |= {f"recall-{_slug(place.partition)}": recall(own, place) for place in places(own)}
        for name, figure in made.items():
            if figure is not None:
                path = folder / f"{_slug(data)}-K{clients}-{name}.png"
                save(figure, path)
                written.add(path)
    for path in set(folder.glob("*.png")) - written:
        path.unlink()
    return len(written)


def styles(found: Sequence[Row], reference: str) -> dict[str, Style]:
    """By label: the reference is one colour, and its variants are hollow points of it; all others differ."""
    ours = next((row.entries[0]["method"] for row in found if row.label == reference), reference)
    looks: dict[str, Style] = {}
    for row in found:
        if row.label in looks:
            continue
        if row.label == reference:
            looks[row.label] = Style(OURS, "*")
        elif row.entries[0]["method"] == ours and row.kind == "one-shot":
            looks[row.label] = Style(OURS, MARKERS[_count(looks, OURS) % len(MARKERS)], hollow=True)
        elif row.kind == "reference":
            looks[row.label] = Style(GREY, MARKERS[_count(looks, GREY) % len(MARKERS)], line=":")
        else:
            number = len(looks) - _count(looks, OURS) - _count(looks, GREY)
            dashed = "--" if row.kind == "flower" else "-"
            looks[row.label] = Style(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], line=dashed)
    return looks


def _count(looks: Mapping[str, Style], colour: str) -> int:
    return sum(style.colour == colour for style in looks.values())


def points(found: Sequence[Row], x_of: Callable[[Row], float | None]) -> dict[str, list[Point]]:
    """By label: where its rows lie, from left to right; rows without an x are left out."""
    made: dict[str, list[Point]] = {}
    for row in found:
        x = x_of(row)
        if x is not None:
            made.setdefault(row.label, []).append((x, row.accuracy.mean, row.accuracy.std or 0.0))
    return {label: sorted(where) for label, where in made.items()}


def scatter(
    found: Sequence[Row], looks: Mapping[str, Style], cost: str, unit: float, x_label: str, title: str
) -> "Figure | None":
    """Accuracy against a cost on a logarithmic axis: one panel for each partition.

    Every point is where its numbers are, also where several lie on each other.
    """
    shown = [row for row in found if row.cost(cost)]
    if not shown:
        return None
    columns = places(shown)
    figure, axes = _panels(len(columns))
    for axis, place in zip(axes, columns, strict=True):
        here = points([row for row in shown if row.place == place], lambda row: (row.cost(cost) or 0) / unit)
        axis.set_xscale("log")
        for label, where in here.items():
            _plot(axis, where, looks[label], label)
        axis.set_title(place.partition, fontsize=10)
        axis.set_xlabel(x_label, fontsize=8)
    _finish(figure, axes, f"{title}: accuracy, mean ± standard deviation over seeds")
    return figure


def skew(found: Sequence[Row], looks: Mapping[str, Style], title: str) -> "Figure | None":
    """Accuracy against skew, from few classes per client to IID; lines join the Dirichlet partitions."""
    order = sorted(places(found), key=lambda place: _skewness(next(row for row in found if row.place == place)))
    if len(order) < 2:
        return None
    figure, (axis,) = _panels(1, (9.0, 4.4))
    dirichlet = {at for at, place in enumerate(order) if place.partition.startswith("Dirichlet")}
    labels = list(dict.fromkeys(row.label for row in found if not looks[row.label].hollow))
    for number, label in enumerate(labels):
        own = [row for row in found if row.label == label]
        most = max(row.rounds for row in own)
        (where,) = points([row for row in own if row.rounds == most], lambda row: order.index(row.place)).values()
        shift = 0.5 * (number / max(1, len(labels) - 1) - 0.5)
        moved = [(x + shift, mean, std) for x, mean, std in where]
        joined = [point for point, (x, _, _) in zip(moved, where, strict=True) if x in dirichlet]
        single = [point for point, (x, _, _) in zip(moved, where, strict=True) if x not in dirichlet]
        name = f"{label}, {most} rounds" if most > 1 else label
        _plot(axis, joined or single, looks[label], name)
        for point in single if joined else single[1:]:
            _plot(axis, [point], looks[label], name)
    axis.set_xticks(range(len(order)), [place.partition for place in order], fontsize=8)
    axis.set_xlabel("partition, from skewed to even", fontsize=9)
    _finish(figure, [axis], f"{title}: accuracy in percent by partition")
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


def _panels(count: int, size: tuple[float, float] = _PANEL) -> "tuple[Figure, list[Any]]":
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    figure = blank(max(size[0] * across, 6.4), size[1] * down + 1.4)
    axes = list(figure.subplots(down, across, squeeze=False, sharey=True).flatten())
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _plot(axis: Any, where: Sequence[Point], style: Style, label: str) -> None:
    xs, means, spreads = zip(*where, strict=True)
    axis.errorbar(
        xs,
        means,
        yerr=spreads if any(spreads) else None,
        label=label,
        color=style.colour,
        marker=style.marker,
        markersize=12 if style.marker == "*" else 6,
        markerfacecolor="white" if style.hollow else style.colour,
        linestyle=style.line,
        linewidth=1.0,
        elinewidth=0.7,
        alpha=0.8,  # what lies below others shows through
        zorder=3 if style.colour == OURS else 2,
    )


def _finish(figure: "Figure", axes: Sequence[Any], title: str) -> None:
    """Grid, ticks, and one legend beside all panels."""
    handles: dict[str, Any] = {}
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0].set_ylabel("accuracy, %", fontsize=9)
    across = max(2, int(figure.get_figwidth() / 2.1))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8, ncols=across, frameon=False)
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=11)


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in text.lower()).strip("-")

"""The charts of a run's report: accuracies, confusion, and the losses step by step.

Axes: Y class; a curve is `{"step": [...], "loss": [...], ...}`, as `progress.Series.thin` gives it.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..common.errors import printable
from .figures import blank, glyphs_in_one_line, write_cells

Curve = Mapping[str, Sequence[float]]

ALONE, OTHERS, STUDENT = "#56B4E9", "#767676", "#D55E00"  # of Okabe and Ito's colours
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
_MOST_CLIENTS = 20  # more are shown as best, mean and worst
_MOST_NUMBERS = 25  # classes, up to which a cell of the confusion matrix shows its number
_MOST_LINES = 24


def as_svg(figure: Figure) -> str:
    """The picture as text; equal pictures are equal texts."""
    FigureCanvasSVG(figure)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "fedmitr"}), glyphs_in_one_line():
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def accuracies(accuracy: Mapping[str, Any], method: str, names: Sequence[str] = ()) -> Figure | None:
    """Bars: each client alone, their weighted mean, the ensemble and the result; what is not known is left out."""
    bars = [
        *_alone(accuracy["local"], names),
        ("one-round FedAvg", accuracy["fedavg"], OTHERS),
        ("ensemble of all clients", accuracy["ensemble"], OTHERS),
        (f"{method}: the global model", accuracy["student"], STUDENT),
    ]
    known = [(name, value, colour) for name, value, colour in bars if value is not None]
    if not known:
        return None
    figure = blank(7.2, 0.9 + 0.32 * len(known))
    axis = figure.subplots()
    labels, values, colours = zip(*reversed(known), strict=True)
    drawn = axis.barh(range(len(known)), values, color=colours, height=0.7)
    axis.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axis.set_yticks(range(len(known)), labels, fontsize=9, parse_math=False)
    axis.set_xlim(0, 108)
    axis.set_xlabel("accuracy, %", fontsize=9)
    _plain(axis)
    return figure


def _alone(local: Sequence[float | None], names: Sequence[str]) -> list[tuple[str, float | None, str]]:
    if len(local) <= _MOST_CLIENTS:
        called = [*map(printable, names), *(f"client {client}" for client in range(len(names), len(local)))]
        return [(f"{name} alone", value, ALONE) for name, value in zip(called, local, strict=False)]
    known = [value for value in local if value is not None]
    every = {"best": max(known), "mean": sum(known) / len(known), "worst": min(known)} if known else {}
    return [(f"clients alone, {name} of {len(known)}", value, ALONE) for name, value in every.items()]


def confusion(counts_YY: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """True classes as rows, answers as columns; shades are shares of a row, numbers are images."""
    size = len(counts_YY)
    numbers = size <= _MOST_NUMBERS
    classes = [printable(name) for name in classes]
    side = 0.46 if numbers else 0.14
    figure = blank(side * size + 2.6, side * size + 1.4)
    axis = figure.subplots()
    shares = np.array([[100 * count / sum(row) if sum(row) else math.nan for count in row] for row in counts_YY])
    shades = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shades, ax=axis, label="% of the true class", shrink=0.8)
    upright = max(map(len, classes)) > 4 or not numbers
    small = 8 if numbers else 5
    axis.set_xticks(range(size), classes, rotation=90 if upright else 0, fontsize=small, parse_math=False)
    axis.set_yticks(range(size), classes, fontsize=small, parse_math=False)
    axis.set_xlabel("answer", fontsize=9)
    axis.set_ylabel("true class", fontsize=9)
    if numbers:
        write_cells(axis, counts_YY, shares > 55)
    return figure


def curves(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Losses and alive share over the steps, a panel for each, from the lines of metrics.jsonl that have a curve."""
    lines = [{"round": line["epoch"], **line} if "epoch" in line else line for line in lines]  # 0.1.0's word
    batches = {
        (line["stage"], line["round"], line["batch"]): line for line in lines if "curve" in line and "batch" in line
    }
    rounds = {line["round"]: line["curve"] for line in lines if "curve" in line and "batch" not in line}
    every = {(line["stage"], name): None for line in batches.values() for name in line["curve"] if name != "step"}
    panels = list(every)  # (stage, value)
    count = len(panels) + bool(rounds)
    if not count:
        return None
    figure = blank(3.7 * count, 3.0)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (stage, name) in zip(axes, panels, strict=False):
        _batches(axis, [line for line in batches.values() if line["stage"] == stage], stage, name)
    if rounds:
        _rounds(axes[-1], [rounds[r] for r in sorted(rounds)])
    return figure


def _batches(axis: Any, lines: Sequence[Mapping[str, Any]], stage: str, name: str) -> None:
    """One line for each batch, coloured by its round."""
    shown = lines[:: max(1, math.ceil(len(lines) / _MOST_LINES))]
    labelled: set[int] = set()
    for line in shown:
        r = line["round"]
        label = None if r in labelled else f"round {r + 1}"
        labelled.add(r)
        values = [100 * value if name == "alive" else value for value in line["curve"][name]]
        axis.plot(line["curve"]["step"], values, color=LINES[r % len(LINES)], linewidth=1.1, label=label)
    axis.set_title(f"{stage}: {'alive patches, %' if name == 'alive' else name}", fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    if name == "alive":
        axis.set_ylim(0, 105)
    if len(labelled) <= len(LINES):
        axis.legend(fontsize=7.5, frameon=False)
    _plain(axis)


def _rounds(axis: Any, rounds: Sequence[Curve]) -> None:
    """The parts of the distillation's loss, round behind round; parts that are 0 throughout are left out."""
    names = [name for name in rounds[0] if name != "step" and any(any(curve[name]) for curve in rounds)]
    for name, colour in zip(names, LINES, strict=False):
        steps: list[float] = []
        values: list[float] = []
        for curve in rounds:
            start = steps[-1] + 1 if steps else 0
            steps += [start + step for step in curve["step"]]
            values += curve[name]
        axis.plot(steps, values, color=colour, linewidth=1.1, label=name)
    axis.set_title("distillation: parts of the loss", fontsize=10)
    axis.set_xlabel("step, all rounds", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7.5, frameon=False)
    _plain(axis)


def diagnosed(found: Mapping[str, Any]) -> Figure:
    """Of `fedmitr diagnose`: noise of the input gradient by step, and the distance of two students by step."""
    noise, moved = found["input_noise"], found["stability"]
    kinds = [kind for kind in noise if kind != "steps"]
    panels = [
        *((f"input gradient under {kind}: share of noise", noise["steps"], _shares(noise[kind])) for kind in kinds),
        ("two students: distance of weights", None, {arm: each["distance"] for arm, each in moved.items()}),
    ]
    figure = blank(4.2 * len(panels), 3.4)
    for axis, (title, steps, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (name, values), colour in zip(lines.items(), LINES, strict=False):
            shown = [math.nan if value is None else value for value in values]
            axis.plot(steps or moved[name]["steps"], shown, color=colour, linewidth=1.1, marker=".", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
        _plain(axis)
    return figure


def _shares(ways: Mapping[str, Any]) -> dict[str, Sequence[float | None]]:
    return {f"{way}, {group}": of["share"] for way, groups in ways.items() for group, of in groups.items()}


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)

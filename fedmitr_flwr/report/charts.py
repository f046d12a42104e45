"""The charts of a run's report, one figure for each panel, so that each is legible on a phone.

Axes: Y class; a curve is `{"step": [...], "loss": [...], ...}`, as `progress.Series.thin` gives it.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..common.errors import printable
from .figures import blank, heat_map

Curve = Mapping[str, Sequence[float]]

ALONE, OTHERS, STUDENT = "#56B4E9", "#8A8A8A", "#D55E00"  # of Okabe and Ito's colours
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#8A8A8A")
_MOST_CLIENTS = 20  # more are shown as best, mean and worst
_MOST_NUMBERS = 25  # classes, up to which a cell of a heat map shows its number
_MOST_LINES = 24
# What a picture would need in a file of its own, and a page has once.
_ALONE = r' (xmlns(:xlink)?="[^"]*"|id="[\w.]+_\d+"|version="1.1"|(width|height)="[\d.]+pt"|transform="rotate\(-0 .*?")'
_ALONE += r'|font-family: [^;"]*;? ?'
_WIDTH = 4.4  # inches of a panel: with text of 9 points, what a phone shows without scrolling


def as_svg(figure: Figure, description: str) -> str:
    """The picture as an element of a page, in whose colour and font its text is; equal pictures are equal texts."""
    FigureCanvasSVG(figure)
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": "fedmitr", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page's fonts may have what matplotlib's lack
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    text = re.sub(_ALONE, "", text)
    least = round(96 * 0.72 * figure.get_figwidth())  # text of 9 points is 9 pixels high then
    return text.replace("<svg", f'<svg role="img" aria-label="{description}" style="min-width: {least}px"', 1)


def accuracies(accuracy: Mapping[str, Any], method: str, names: Sequence[str] = ()) -> Figure | None:
    """Bars: each client alone, their weighted mean, the ensemble and the result; what is not known is left out."""
    bars = [
        *_alone(accuracy["local"], names),
        ("one-round FedAvg", accuracy["fedavg"], OTHERS),
        ("ensemble", accuracy["ensemble"], OTHERS),
        (f"{method}: global", accuracy["student"], STUDENT),
    ]
    known = [(name, value, colour) for name, value, colour in bars if value is not None]
    if not known:
        return None
    figure = blank(_WIDTH, 0.9 + 0.27 * len(known))
    axis = figure.subplots()
    labels, values, colours = zip(*reversed(known), strict=True)
    drawn = axis.barh(range(len(known)), values, color=colours, height=0.7)
    axis.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axis.set_yticks(range(len(known)), labels, parse_math=False)
    axis.set_xlim(0, 112)
    axis.set_xlabel("accuracy, %")
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
    shares = np.array([[100 * count / sum(row) if sum(row) else math.nan for count in row] for row in counts_YY])
    texts = counts_YY if len(counts_YY) <= _MOST_NUMBERS else None
    return heat_map(shares, classes, classes, ("answer", "true class"), "% of the true class", texts)


def weights(teachers: Mapping[str, Sequence[float]], classes: Sequence[str], names: Sequence[str]) -> Figure:
    """The share that each teacher's answer has in the ensemble's, by class."""
    rows = [printable(names[int(k)]) if k.isdecimal() and int(k) < len(names) else k for k in teachers]
    shares = 100 * np.array(list(teachers.values()))
    texts = [[f"{share:.0f}" for share in row] for row in shares] if shares.shape[1] <= _MOST_NUMBERS else None
    return heat_map(shares, rows, classes, ("class", "teacher of client"), "% of the ensemble", texts)


def learning(lines: Sequence[Mapping[str, Any]], accuracy: Mapping[str, Any]) -> Figure | None:
    """The student's accuracy by epoch, round behind round, with what it is compared with as lines."""
    rounds: dict[int, dict[int, float]] = {}
    for line in lines:
        if line.get("stage") == "student":
            rounds.setdefault(line["round"], {})[line["epoch"]] = line["accuracy"]
    if not rounds:
        return None
    figure = blank(_WIDTH, 2.6)
    axis, behind = figure.subplots(), 0
    for r, found in sorted(rounds.items()):
        epochs = sorted(found)
        axis.plot([behind + e for e in epochs], [found[e] for e in epochs], color=STUDENT, marker="o", markersize=3)
        behind += epochs[-1]
        if r < max(rounds):
            axis.axvline(behind, color=OTHERS, linewidth=0.6, linestyle=":")
    for name, style in (("fedavg", "--"), ("ensemble", "-")):
        if accuracy[name] is not None:
            axis.axhline(accuracy[name], color=OTHERS, linewidth=1, linestyle=style, label=name)
    axis.set_xlabel("epoch over the synthetic images" + ", all rounds" * (len(rounds) > 1))
    axis.set_ylabel("accuracy, %")
    axis.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    _plain(axis)
    return figure


def recalls(values: Sequence[float]) -> Figure:
    """How many classes have which recall."""
    figure = blank(_WIDTH, 2.2)
    axis = figure.subplots()
    axis.hist(values, bins=range(0, 101, 5), color=STUDENT)
    axis.set_xlabel("recall, %")
    axis.set_ylabel("classes")
    _plain(axis)
    return figure


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Losses and alive share over the steps, a panel for each, from the lines of metrics.jsonl that have a curve."""
    lines = [{"round": line["epoch"], **line} if "epoch" in line else line for line in lines]  # 0.1.0's word
    batches = {
        (line["stage"], line["round"], line["batch"]): line for line in lines if "curve" in line and "batch" in line
    }
    rounds = {line["round"]: line["curve"] for line in lines if "curve" in line and "batch" not in line}
    panels = {(line["stage"], name): None for line in batches.values() for name in line["curve"] if name != "step"}
    found = [
        _batches([line for line in batches.values() if line["stage"] == stage], stage, name) for stage, name in panels
    ]
    return [*found, _rounds([rounds[r] for r in sorted(rounds)])] if rounds else found


def _batches(lines: Sequence[Mapping[str, Any]], stage: str, name: str) -> Figure:
    """One line for each batch, coloured by its round."""
    figure = blank(_WIDTH, 2.6)
    axis = figure.subplots()
    shown = lines[:: max(1, math.ceil(len(lines) / _MOST_LINES))]
    labelled: set[int] = set()
    for line in shown:
        r = line["round"]
        label = None if r in labelled else f"round {r + 1}"
        labelled.add(r)
        values = [100 * value if name == "alive" else value for value in line["curve"][name]]
        axis.plot(line["curve"]["step"], values, color=LINES[r % len(LINES)], linewidth=1.1, label=label)
    axis.set_title(f"{stage}: {'alive patches, %' if name == 'alive' else name}", fontsize=10)
    axis.set_xlabel("step; a line for each batch of images" if len(shown) > len(labelled) else "step")
    if name == "alive":
        axis.set_ylim(0, 105)
    if len(labelled) <= len(LINES):
        axis.legend(fontsize=8, frameon=False)
    _plain(axis)
    return figure


def _rounds(rounds: Sequence[Curve]) -> Figure:
    """The parts of the distillation's loss, round behind round; parts that are 0 throughout are left out."""
    figure = blank(_WIDTH, 2.6)
    axis = figure.subplots()
    names = [name for name in rounds[0] if name != "step" and any(any(curve[name]) for curve in rounds)]
    for number, (name, colour) in enumerate(zip(names, LINES, strict=False)):
        steps: list[float] = []
        values: list[float] = []
        for curve in rounds:
            start = steps[-1] + 1 if steps else 0
            steps += [start + step for step in curve["step"]]
            values += curve[name]
        # Of two that lie on each other, the one below is wide and the other one has gaps.
        look: dict[str, Any] = {"linewidth": 2.2} if number < len(names) - 1 else {"linewidth": 1.1, "linestyle": "--"}
        axis.plot(steps, values, color=colour, label=name, **look)
    axis.set_title("distillation: parts of the loss", fontsize=10)
    axis.set_xlabel("step, all rounds")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    _plain(axis)
    return figure


def diagnosed(found: Mapping[str, Any]) -> list[Figure]:
    """Of `fedmitr diagnose`: noise of the input gradient by step, and the distance of two students by step."""
    noise, moved = found["input_noise"], found["stability"]
    panels = [
        *(
            (f"input gradient under {kind}: share of noise", noise["steps"], _shares(noise[kind]))
            for kind in noise
            if kind != "steps"
        ),
        ("two students: distance of weights", None, {arm: each["distance"] for arm, each in moved.items()}),
    ]
    figures = []
    for title, steps, lines in panels:
        figures.append(blank(_WIDTH, 3.0))
        axis = figures[-1].subplots()
        for (name, values), colour in zip(lines.items(), LINES, strict=False):
            shown = [math.nan if value is None else value for value in values]
            axis.plot(steps or moved[name]["steps"], shown, color=colour, linewidth=1.1, marker=".", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
        _plain(axis)
    return figures


def _shares(ways: Mapping[str, Any]) -> dict[str, Sequence[float | None]]:
    return {f"{way}, {group}": of["share"] for way, groups in ways.items() for group, of in groups.items()}


def runs(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Of several runs, the student's accuracy as a point, between those of FedAvg and the ensemble."""
    figure = blank(_WIDTH + 2, 1.0 + 0.3 * len(found))
    axis = figure.subplots()
    for name, marker, colour in (("fedavg", "|", OTHERS), ("ensemble", "d", OTHERS), ("student", "o", STUDENT)):
        known = [
            (run["accuracy"][name], y) for y, run in enumerate(found.values()) if run["accuracy"][name] is not None
        ]
        if known:
            axis.plot(*zip(*known, strict=True), marker, color=colour, markersize=7, label=name)
    axis.set_yticks(range(len(found)), map(printable, found), parse_math=False)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("accuracy, %")
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    _plain(axis)
    return figure


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)

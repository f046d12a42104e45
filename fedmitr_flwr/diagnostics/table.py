"""What `diagnostics.json` says, as tables: for the terminal and for report.html."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NAME = "diagnostics.json"


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(found: Mapping[str, Any]) -> list[Table]:
    """One for each quantity, and one of what needs real images."""
    sizes, noise, moved = found["sizes"], found["input_noise"], found["stability"]
    kinds, probes = [kind for kind in noise if kind != "steps"], next(iter(moved.values()))["losses"]
    of_noise = [
        (f"{way}, {group}", *_said(noise[kind][way][group][what][-1] for kind in kinds for what in ("noise", "share")))
        for way in noise[kinds[0]]
        for group in ("alive", "halted")
    ]
    of_moved = [
        (arm, *_said(each[-1] for each in (of["distance"], of["way"], *(of["losses"][probe] for probe in probes))))
        for arm, of in moved.items()
    ]
    wanted = [("loss", "pool"), ("loss", "test"), ("loss", "gap"), ("accuracy", "pool"), ("accuracy", "test")]
    of_gap = [
        (student, *_said(of.get(where, {}).get(what) for what, where in wanted)) for student, of in found["gap"].items()
    ]
    norms = f"Length of an image's gradient of the whole loss by all weights ({sizes['gradients']} images)"
    lengths = {
        at: {cell: of["whole"] for cell, of in cells.items()} for at, cells in found["student_gradients"].items()
    }
    return [
        Table(
            "Noise of the input gradient at the last step, in a patch: variance, and its share of the mean square",
            ("Inversion, patches", *(f"{kind}: {what}" for kind in kinds for what in ("variance", "share"))),
            of_noise,
        ),
        _by_point(norms, lengths, {"max": "max", "p95": "95 %", "mean": "mean"}),
        _by_point(
            "Trace of the covariance of the head's gradient on patch tokens",
            found["head_variance"],
            {"token": "by token", "image": "by image", "within": "soft labels save in theory"},
        ),
        Table(
            "Relabelling on real test images (analysis only)",
            ("Student", "Bias²", "Trace saved, by token", "Soft labels save in theory"),
            [
                (at, *_said(of[name] for name in ("bias", "saved", "within")))
                for at, of in found.get("relabel_bias", {}).items()
            ],
        ),
        Table(
            f"Two students whose pools differ in {sizes['replaced']} of {sizes['images']} images, at the end",
            (
                "Pool, labels",
                "distance of weights",
                "way from the start",
                *(f"losses apart, {name}" for name in probes),
            ),
            of_moved,
        ),
        Table(
            "Generalisation of the class token",
            ("Student of", *(f"{what}, {where}" for what, where in wanted)),
            of_gap,
        ),
    ]


def as_text(found: Mapping[str, Any]) -> str:
    """The tables that have rows, for a terminal."""
    return "\n\n".join(_drawn(table) for table in tables(found) if table.rows)


def _drawn(table: Table) -> str:
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in zip(*columns, strict=True)
    ]
    return "\n".join([table.title, *("  ".join([line[0].strip().ljust(widths[0]), *line[1:]]) for line in lines)])


def _by_point(title: str, points: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """Rows by images and labels; columns by name, before and after distillation."""
    head = ("Images, labels", *(f"{at}: {said}" for at in points for said in names.values()))
    cells = next(iter(points.values()))
    return Table(
        title, head, [(cell, *_said(points[at][cell][name] for at in points for name in names)) for cell in cells]
    )


def _said(values: Iterable[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.3g}" for value in values]

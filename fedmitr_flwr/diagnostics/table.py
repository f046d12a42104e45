"""What `diagnostics.json` says, as tables: for the terminal and for report.html."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NAME = "diagnostics.json"


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    @classmethod
    def of(cls, title: str, head: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> "Table":
        """Rows by name."""
        said = {name: ("-" if value is None else f"{value:.3g}" for value in row) for name, row in rows.items()}
        return cls(title, tuple(head), [(name, *row) for name, row in said.items()])


def tables(found: Mapping[str, Any]) -> list[Table]:
    """One for each quantity; what needs real images has one of its own, where there were some."""
    sizes, noise, moved, real = found["sizes"], found["input_noise"], found["stability"], found.get("relabel_bias", {})
    kinds, probes = [kind for kind in noise if kind != "steps"], list(next(iter(moved.values()))["losses"])
    ways = [(way, group) for way in noise[kinds[0]] for group in ("alive", "halted")]
    wanted = [("loss", "pool"), ("loss", "test"), ("loss", "gap"), ("accuracy", "pool"), ("accuracy", "test")]
    lengths = {
        at: {of: each["whole"] for of, each in cells.items()} for at, cells in found["student_gradients"].items()
    }
    made = [
        Table.of(
            "Noise of the input gradient at the last step, in a patch: variance, and its share of the mean square",
            ("Inversion, patches", *(f"{kind}: {what}" for kind in kinds for what in ("variance", "share"))),
            {
                f"{way}, {group}": [noise[kind][way][group][what][-1] for kind in kinds for what in ("noise", "share")]
                for way, group in ways
            },
        ),
        _by_point(
            f"Length of an image's gradient of the whole loss by all weights ({sizes['gradients']} images)",
            lengths,
            {"max": "max", "p95": "95 %", "mean": "mean"},
        ),
        _by_point(
            "Trace of the covariance of the head's gradient on patch tokens",
            found["head_variance"],
            {"token": "by token", "image": "by image", "within": "soft labels save in theory"},
        ),
        Table.of(
            "Relabelling on real test images (analysis only)",
            ("Student", "bias²", "trace saved, by token", "soft labels save in theory"),
            {at: [each["bias"], each["saved"], each["within"]] for at, each in real.items()},
        ),
        Table.of(
            f"Two students whose pools differ in {sizes['replaced']} of {sizes['images']} images, at the end",
            (
                "Pool, labels",
                "distance of weights",
                "way from the start",
                *(f"losses apart, {name}" for name in probes),
            ),
            {
                arm: [each["distance"][-1], each["way"][-1], *(each["losses"][probe][-1] for probe in probes)]
                for arm, each in moved.items()
            },
        ),
        Table.of(
            "Generalisation of the class token",
            ("Student of", *(f"{what}, {where}" for what, where in wanted)),
            {name: [each.get(where, {}).get(what) for what, where in wanted] for name, each in found["gap"].items()},
        ),
    ]
    return [table for table in made if table.rows]


def as_text(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    return "\n\n".join(map(_drawn, tables(found)))


def _drawn(table: Table) -> str:
    lines = [table.head, *table.rows]
    first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ([name.ljust(first), *map(str.rjust, cells, widths)] for name, *cells in lines)
    return "\n".join([table.title, *map("  ".join, texts)])


def _by_point(title: str, points: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """Rows by images and labels; columns by name, before and after distillation."""
    head = ("Images, labels", *(f"{at}: {said}" for at in points for said in names.values()))
    rows = next(iter(points.values()))
    return Table.of(title, head, {row: [points[at][row][name] for at in points for name in names] for row in rows})

"""The tables of docs/performance.md, from files that benchmarks/inversion_speed.py has written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markup import provenance, sections

from fedmitr_flwr.bench.markup import figure, table

COLUMNS = ["K", "Mode", "Images", "Seconds (min, max)", "Images/s", "× dense", "Bound", "Of the bound", "MFU"]
COLUMNS += ["Peak MiB (before)", "Loss"]
OPTIONS = {  # shown where a file's rows differ in them; the last three have one value in files of today
    "route": "Route",
    "teachers_each": "Teachers asked",
    "precision": "Precision",
    "teacher_chunk": "Chunk",
    "compile": "Compiled",
}

Row = Mapping[str, Any]


def block(results: Path) -> str:
    """The Markdown of all files of a folder."""
    return sections(results, section, "inversion_speed.py")


def section(content: Mapping[str, Any]) -> list[str]:
    """One file: what was measured, its rows, and where it comes from."""
    rows, peaks = content["rows"], content["peak_flops"]
    first, repeats = rows[0], len(rows[0]["seconds"])
    shown = {key: name for key, name in OPTIONS.items() if differ(rows, key)}
    fastest = ", ".join(f"{flops / 1e9:.0f} GFLOP/s ({precision})" for precision, flops in peaks.items())
    return [
        f"### {content['model']}, {first['img_size']} px, {first['patches']} patches, {first['batch']} targets, "
        f"T = {first['steps']}, K = {', '.join(dict.fromkeys(str(row['teachers']) for row in rows))}",
        "",
        f"{'One run' if repeats == 1 else f'Medians of {repeats} runs'}. A large product of matrices: {fastest}.",
        "",
        *table([*COLUMNS, *shown.values()], [[*cells(row), *(option(row[key]) for key in shown)] for row in rows]),
        "",
        *provenance(content),
    ]


def differ(rows: list[Row], key: str) -> bool:
    """Whether rows of as many teachers differ in a setting."""
    return any(row.get(key) != other.get(key) for row in rows for other in rows if row["teachers"] == other["teachers"])


def cells(row: Row) -> list[str]:
    low, high = row["seconds_spread"]
    return [
        str(row["teachers"]),
        row["mode"],
        str(row["images"]),
        f"{figure(row['seconds_median'])} ({figure(low)}, {figure(high)})",
        *(figure(row[key]) for key in ("images_per_second", "ratio_to_dense", "ratio_bound")),
        *(f"{100 * row[key]:.0f} %" for key in ("bound_fraction", "mfu")),
        "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} ({row['start_mib']:.0f})",
        "-" if row["loss"] is None else figure(row["loss"]["mean"]),
    ]


def option(value: object) -> str:
    return figure(value) if isinstance(value, float) else str(value)

"""Markdown that all tables of results have in common."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def figure(value: float) -> str:
    """Three digits are more than a busy machine can tell."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """`mean ± std (n)` of the known values; the sample standard deviation (n - 1), which one value does not have."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation} ({len(known)})"


def origin(content: Mapping[str, Any]) -> str:
    """The machine, versions and code of a result file."""
    machine, versions = content["machine"], content["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    known = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    note = f" {content['note']}" if "note" in content else ""
    return f"Machine: {device}. {known}. Code {content['fingerprint']}.{note}"

"""What all tables of results have in common, in Markdown and in LaTeX."""

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


_IN_TEX = {"\\": r"\textbackslash{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}"}
_IN_TEX |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$"}
_MARKED = {r"\*\*(.+?)\*\*": r"\\textbf{\1}", r"\*(.+?)\*": r"\\textit{\1}", "`(.+?)`": r"\\texttt{\1}"}


def tabular(lines: Sequence[str]) -> list[str]:
    """A table of `table` for LaTeX, by its packages booktabs and amssymb."""
    first, _, *rows = ([_in_tex(cell) for cell in line[2:-2].split(" | ")] for line in lines if line[:1] == "|")
    head, *body = (f"{' & '.join(row)} \\\\" for row in (first, *rows))
    columns = "l" + "r" * (lines[-1].count(" | "))
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def _in_tex(text: str) -> str:
    text = "".join(_IN_TEX.get(letter, letter) for letter in text)
    for mark, command in _MARKED.items():
        text = re.sub(mark, command, text)
    return text


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

"""Markdown that the benchmarks have in common."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def figure(value: float) -> str:
    """Three digits are more than a busy machine can tell."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def origin(content: Mapping[str, Any]) -> str:
    """The machine, versions and code of a result file."""
    machine, versions = content["machine"], content["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    known = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    note = f" {content['note']}" if "note" in content else ""
    return f"Machine: {device}. {known}. Code {content['fingerprint']}.{note}"


def sections(results: Path, section: Callable[[Mapping[str, Any]], list[str]], maker: str) -> str:
    """The Markdown of all files of a folder, in the order of their names; `maker` is the script that wrote them."""
    texts = []
    for path in sorted(results.glob("*.json")):
        try:
            texts.append("\n".join(section(json.loads(path.read_text(encoding="utf-8")))))
        except (LookupError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a file of benchmarks/{maker} ({error!r}); make it again") from error
    return "\n\n".join(texts) or "No measurements are committed yet."

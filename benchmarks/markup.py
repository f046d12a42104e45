"""Markdown of a folder of measurements; what all tables have in common is in fedmitr_flwr/bench/markup.py."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmitr_flwr.bench.markup import origin


def sections(results: Path, section: Callable[[Mapping[str, Any]], list[str]], maker: str) -> str:
    """The Markdown of all files of a folder, in the order of their names; `maker` is the script that wrote them."""
    texts = []
    for path in sorted(results.glob("*.json")):
        try:
            texts.append("\n".join(section(json.loads(path.read_text(encoding="utf-8")))))
        except (LookupError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a file of benchmarks/{maker} ({error!r}); make it again") from error
    return "\n\n".join(texts) or "No measurements are committed yet."


def provenance(content: Mapping[str, Any]) -> list[str]:
    """The last lines of a section: how its file was made, and where."""
    return [f"Command: `{content['command']}`", "", origin(content)]

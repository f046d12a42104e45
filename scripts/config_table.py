"""Write the table [tool.flwr.app.config] of pyproject.toml anew from the config classes of fedmitr_flwr."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fedmitr_flwr.config import Config  # noqa: E402 - the checkout, not an installed copy
from fedmitr_flwr.config.text import toml_value  # noqa: E402

HEADER = "[tool.flwr.app.config"


def comments(source: str) -> dict[str, str]:
    """What stands behind each field of the config classes, by key."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        section = ""
        for line in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "section":
                section = f"{ast.literal_eval(line.value)}."
            elif isinstance(line, ast.AnnAssign):
                key = f"{section}{ast.unparse(line.target)}".replace("_", "-")
                found[key] = lines[line.lineno - 1].partition("  # ")[2]
    return found


def table() -> Iterator[str]:
    said: dict[str, str] = {}
    for name in ("config.py", "sections.py"):
        said |= comments((ROOT / "fedmitr_flwr" / "config" / name).read_text(encoding="utf-8"))
    header = ""
    for key, value in Config().to_flat().items():
        section, _, name = key.rpartition(".")
        if header != (header := f"{HEADER}{'.' * bool(section)}{section}]"):
            yield f"\n{header}"
        yield f"{name} = {toml_value(value)}" + (f" # {said[key]}" if said[key] else "")


def main() -> None:
    path = ROOT / "pyproject.toml"
    blocks = re.split(r"\n(?=\[)", path.read_text(encoding="utf-8"))
    kept = [block.strip("\n") for block in blocks if not block.startswith(HEADER)]
    place = max(number for number, block in enumerate(kept) if block.startswith("[tool.flwr")) + 1
    kept.insert(place, "\n".join(table()).strip())
    path.write_text("\n\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

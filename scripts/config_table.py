"""Write the table [tool.flwr.app.config] of pyproject.toml anew from the config classes of fedmitr_flwr."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fedmitr_flwr.config import Config  # noqa: E402 - the checkout, not an installed copy
from fedmitr_flwr.config.described import table  # noqa: E402

HEADER = "tool.flwr.app.config"


def main() -> None:
    path = ROOT / "pyproject.toml"
    blocks = re.split(r"\n(?=\[)", path.read_text(encoding="utf-8"))
    kept = [block.strip("\n") for block in blocks if not block.startswith(f"[{HEADER}")]
    place = max(number for number, block in enumerate(kept) if block.startswith("[tool.flwr")) + 1
    kept.insert(place, "\n".join(table(Config().to_flat(), HEADER)))
    path.write_text("\n\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Which of timm's vision transformers can be run by patches: each equal to timm's own forward, or refused by name.

    python benchmarks/timm_vits.py

Every name in a module of timm that uses `VisionTransformer`, or that begins like one, is built with drawn weights, two
blocks and images of 4 x 4 patches. Class logits of both forwards by patches are compared with those of timm's forward.
"""

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from timm.models import list_modules  # noqa: E402

from fedmitr_flwr.common.errors import ModelError  # noqa: E402
from fedmitr_flwr.common.files import write_text  # noqa: E402
from fedmitr_flwr.config import ModelConfig  # noqa: E402 - the checkout, not an installed copy
from fedmitr_flwr.vit.build import TOLERANCE, token_difference  # noqa: E402
from fedmitr_flwr.vit.names import architecture  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "models" / "timm_vits.json"
BEGINNINGS = ("vit", "deit", "eva", "beit", "naflexvit", "samvit")
GRID = 4  # patches along a side


def names() -> list[str]:
    """Every architecture of timm that is a vision transformer by its module or by its name."""
    using = [name for name in list_modules() if hasattr(import_module(f"timm.models.{name}"), "VisionTransformer")]
    by_module = {name for module in using for name in timm.list_models(module=module)}
    return sorted(by_module | {name for name in timm.list_models() if name.startswith(BEGINNINGS)})


def small_images(name: str) -> ModelConfig:
    """The settings of `name` on its patches and channels, with few of them.

    Raises:
        ModelError: it is refused.
    """
    known = architecture(name)
    shape = {"patch_size": known.patch_size, "img_size": GRID * known.patch_size, "in_chans": known.in_chans}
    return ModelConfig(name=name, num_classes=10, **shape)


def sweep(wanted: list[str]) -> dict[str, Any]:
    """What the JSON file holds."""
    equal, refused = {}, {}
    for name in wanted:
        try:
            apart = token_difference(small_images(name))
        except ModelError as error:
            refused[name] = str(error)
        else:
            if apart <= TOLERANCE:
                equal[name] = apart
            else:
                refused[name] = f"logits differ by {apart:.2g}"
    return {
        "versions": {"timm": timm.__version__, "torch": torch.__version__.partition("+")[0]},
        "tolerance": TOLERANCE,
        "counts": {"names": len(wanted), "equal": len(equal), "refused": len(refused)},
        "largest_difference": max(equal.values()),
        "equal": sorted(equal),
        "refused": refused,
    }


def main() -> int:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args()
    started = time.perf_counter()
    found = sweep(names())
    found["seconds"] = round(time.perf_counter() - started)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    counts = found["counts"]
    print(
        f"timm {timm.__version__}: {counts['equal']} equal and {counts['refused']} refused of {counts['names']} names"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of a run, and memory and seconds of its loading, on images that are much larger than the model's.

    python benchmarks/decoding_memory.py --json benchmarks/results/memory/decoding.json

Two folders are made in a temporary one: 64 JPEGs of 4000 x 3000, and one PNG of 5000 x 5000 before 2,000 of 28 x 28.
Each is loaded by the project's own loader at 8 px in a process of its own; its peak is the kernel's mark of the highest
resident size, with the interpreter and all that the loader imports (`start_mib`, before the first image). Another
process makes a whole `fedmitr run` of it (`run_mib`), in which little is trained. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed.gauges import peak

from fedmitr_flwr import cli
from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.provenance import machine, versions
from fedmitr_flwr.config import DataConfig, ModelConfig
from fedmitr_flwr.data.sources import load

IMG_SIZE = 8
LIMIT_MIB = 953  # 1 GB
SETTINGS = ("model.img-size=8", "model.patch-size=2", "partition.scheme=iid", "partition.clients=2", "local.epochs=1")
SETTINGS += ("inversion.steps=5", "distill.rounds=1", "distill.images-per-round=20", "distill.epochs-per-round=1")


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Colour fields under noise, which compress about as photographs do."""
    rng = np.random.default_rng(seed)
    fields = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(fields) + noise).clip(0, 255).astype(np.uint8))


def photographs(folder: Path) -> None:
    """64 JPEGs of 4000 x 3000 in two classes."""
    for i in range(64):
        picture(4000, 3000, i).save(class_folder(folder, i) / f"{i:04}.jpg", quality=90)


def one_large(folder: Path) -> None:
    """2,001 PNGs in two classes, of which the first to be decoded has 5000 x 5000 pixels and all others 28 x 28."""
    picture(5000, 5000, 0).save(class_folder(folder, 0) / "0000.png", compress_level=1)
    for i in range(1, 2001):
        picture(28, 28, i).save(class_folder(folder, i) / f"{i:04}.png")


CASES = {"64 JPEGs of 4000 x 3000": photographs, "5000 x 5000 before 2,000 of 28 x 28": one_large}


def class_folder(folder: Path, i: int, split: str = "train") -> Path:
    made = folder / split / "ab"[i % 2]
    made.mkdir(parents=True, exist_ok=True)
    return made


def load_here(folder: str) -> dict[str, Any]:
    """What loading costs this process."""
    start, begin = peak_mib(), time.perf_counter()
    model = ModelConfig(num_classes=2, in_chans=3, img_size=IMG_SIZE)
    data = load(DataConfig(source="imagefolder", path=folder), model, with_test=False)
    seconds = round(time.perf_counter() - begin, 2)
    shape = list(data.train.pixels.shape)
    return {"start_mib": start, "peak_mib": peak_mib(), "seconds": seconds, "pixels": shape}


def peak_mib() -> int:
    return int(peak(torch.device("cpu")))


def run_here(folder: str) -> dict[str, Any]:
    """What a whole run of two clients costs this process; it must succeed."""
    for i in range(20):
        picture(28, 28, i).save(class_folder(Path(folder), i, "test") / f"{i:04}.png")
    with redirect_stdout(sys.stderr):
        if status := cli.main(["run", f"data.path={folder}", f"out-dir={folder}/runs", *SETTINGS]):
            raise SystemExit(status)
    return {"run_mib": peak_mib()}


def measured(name: str) -> dict[str, Any]:
    """What loading a case of CASES, and a run of it, cost a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        CASES[name](Path(folder))
        script = [sys.executable, str(Path(__file__).resolve())]
        return {"case": name, **output([*script, "--load", folder]), **output([*script, "--run", folder])}


def output(words: Sequence[str]) -> Any:
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where a case needs more than LIMIT_MIB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # in the process of its own
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.load or options.run:
        print(json.dumps(load_here(options.load) if options.load else run_here(options.run)))
        return 0
    rows = []
    for name in CASES:
        rows.append(measured(name))
        print(
            "{case}: {peak_mib} MiB ({start_mib} before), {seconds} s; a run {run_mib} MiB".format(**rows[-1]),
            flush=True,
        )
    content = {
        "command": "python benchmarks/decoding_memory.py" + (f" --json {options.json}" if options.json else ""),
        "machine": machine("cpu"),
        "versions": versions(),
        "fingerprint": fingerprint(),
        "img_size": IMG_SIZE,
        "limit_mib": LIMIT_MIB,
        "rows": rows,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(max(row["peak_mib"], row["run_mib"]) > LIMIT_MIB for row in rows))


if __name__ == "__main__":
    sys.exit(main())

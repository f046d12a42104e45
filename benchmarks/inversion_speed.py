r"""Finished images per second of each inversion mode, against `dense` and against what arithmetic allows.

    python benchmarks/inversion_speed.py --model deit_tiny_patch16_224 --img-size 224 --weights FILE \
        --teachers 1,3 --batch 8 --steps 80 --modes dense,sparse,pri4 --repeats 3 --json OUT

Work is equal: every mode gets the same T, batch, loss, targets and first noise. Each repeat draws (balanced) targets
and noise anew and runs all arms that share an ensemble one after the other, beginning with another arm each time, so
that a drift of the machine meets all. Ratios are of medians. An image counts as finished only if its final loss is
finite; the rows keep the mean, least and greatest of these losses. Not in the seconds: loading the teachers, and the
short runs before, which also check that the steps taken are those that are counted.

FLOPs and bounds (speed/flops.py) are of the optimisation steps only, with a last block that works for [CLS] alone: what
importance costs shows in "Of the bound". MFU is of the FLOP/s of a large matrix product in float32, timed
here. Peak memory (speed/gauges.py) is the kernel's mark of the process's highest resident size, set back before each
run, or CUDA's allocator's. Arms share one process, so it holds torch and the teachers too. The teachers are upload
files in a temporary folder (speed/uploads.py).
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from speed.arms import Bench, arms_of, config_of
from speed.document import section
from speed.flops import Shape
from speed.gauges import peak_flops
from speed.rows import Arm, Row, Run
from speed.uploads import DESCRIPTION, owned_classes, write_uploads

from fedmitr_flwr.common.compute import resolve_device, threads
from fedmitr_flwr.common.errors import ConfigError, UserError
from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.provenance import machine, versions
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.uploads.upload import load
from fedmitr_flwr.vit.build import build_vit


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values of `kind`, separated by commas."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it where a value is wrong
    return parse


def positive(text: str) -> int:
    """An argparse type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible; use a number >= 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--device", default="cpu", help="auto | cpu | cuda")
    add("--threads", type=int, default=0, help="CPU threads; 0: one per core")
    add("--model", default="deit_tiny_patch16_224", help="any plain timm ViT")
    add("--img-size", type=positive, default=224)
    add("--patch-size", type=positive, default=16)
    add("--num-classes", type=int, default=10)
    add("--weights", default="none", help="none (random) | path of a safetensors file")
    add("--teachers", type=list_of(positive), default=[1], metavar="K,...")
    add("--batch", type=positive, default=8, help="targets inverted at once")
    add("--steps", type=positive, default=80, help="T")
    add("--modes", type=list_of(str), default=["dense", "sparse", "pri4"], metavar="MODE,...")
    add("--stops", default="0.0125,0.025,0.05,0.075", help="of sparse")
    add("--route", type=list_of(float), default=[0.0], metavar="THRESHOLD,...", help="0: all teachers for all images")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of the project")
    add("--repeats", type=positive, default=3)
    add("--warmup", type=int, default=1, help="short runs of each arm before the first measured one")
    add("--peak-size", type=int, default=0, help="rows of the matrices that tell peak FLOP/s; 0: by device")
    add("--seed", type=int, default=0)
    add("--json", type=Path, required=True)
    return made


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured: FLOP/s of the machine, and the rows."""
    device = resolve_device(options.device)
    peak = peak_flops(device, options.peak_size)
    print(f"peak {peak / 1e9:.0f} GFLOP/s (float32)", flush=True)
    rows: list[Row] = []
    for count in options.teachers:
        arms = arms_of(count, options)
        config = config_of(arms[0], options)
        with tempfile.TemporaryDirectory() as folder:
            paths = write_uploads(Path(folder), count, config.model, options.seed)
            ensemble = Ensemble.of([load(path) for path in paths], config.model, config.ensemble).to(device)
            bench = Bench(arms, ensemble, options)
            bench.run(lambda repeat, arm, run: told(f"repeat {repeat + 1} of {options.repeats}", arm, run))
        rows += bench.rows(Shape.of(build_vit(config.model)), peak)
    return {"peak_flops": {"float32": peak}, "rows": rows}


def told(when: str, arm: Arm, run: Run) -> None:
    """One line of progress."""
    loss = f"mean loss {sum(run.losses) / len(run.losses):.3f}" if run.losses else "no finite loss"
    print(f"{when}: {arm}: {run.cost.seconds:.2f} s, {len(run.losses)} images, {loss}", flush=True)


def command(words: Sequence[str]) -> str:
    """What was called; of whole paths only the last two parts, for folders are the machine's."""
    shown = []
    for word in words:
        before, equals, value = word.rpartition("=")
        path = Path(value)
        shown.append(before + equals + "/".join(path.parts[-2:]) if path.is_absolute() else word)
    return shlex.join(["python", "benchmarks/inversion_speed.py", *shown])


def check(options: argparse.Namespace) -> None:
    """Refuse before anything is measured.

    Raises:
        ConfigError: an impossible arm, or nothing to compare with.
    """
    if "dense" not in options.modes:
        raise ConfigError("--modes has no dense, to which all are compared; add it")
    for arm in arms_of(1, options):
        config_of(arm, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 2 where the options are not possible."""
    options = parser().parse_args(argv)
    try:
        check(options)
        with threads(options.threads):
            found = measured(options)
            facts = machine(str(resolve_device(options.device))) | {"threads": torch.get_num_threads()}
            facts["float32_matmul"] = torch.get_float32_matmul_precision()
    except UserError as error:
        print(f"inversion_speed: error: {error}", file=sys.stderr)
        return 2
    content = {
        "command": command(sys.argv[1:] if argv is None else argv),
        "machine": facts,
        "versions": versions(),
        "fingerprint": fingerprint(),
        "model": options.model,
        "teachers": DESCRIPTION,
        "classes": {str(count): owned_classes(count, options.num_classes) for count in options.teachers},
        **found,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    owners = [f"{count} teachers own {text}" for count, text in content["classes"].items()]
    print("", DESCRIPTION, "Classes: " + ". ".join(owners) + ".", "", *section(content), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

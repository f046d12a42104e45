"""What the studies over seeds have in common: their options, seeds side by side, images made once, and their file."""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from fedmitr_flwr.common.files import write_text
from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.provenance import versions
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.text import PATHS, read_settings
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.result import Inverted
from fedmitr_flwr.runs.folder import RunFolder

Rows = list[dict[str, Any]]
Memory = dict[bytes, Inverted]
Part = tuple[Rows, dict[str, Any]]  # one seed's rows, and the facts of its uploads


def facts(uploads: RunFolder) -> dict[str, Any]:
    """What the result of a run says of code, machine and settings; of paths the last part, and none of its own."""
    result = uploads.read_result()
    config = result["config"]
    named = {key: PurePath(config[key]).name for key in PATHS if Path(config[key]).is_absolute()}
    result["config"] = {key: value for key, value in (config | named).items() if key != "out-dir"}
    return {key: result[key] for key in ("fingerprint", "versions", "machine", "config")}


def remembered(memory: Memory) -> Callable[..., Inverted]:
    """`invert`, done once for all relabellings: equal settings, targets and random stream give equal images."""

    def invert_once(ensemble: Ensemble, targets: Tensor, *settings: Any, rng: torch.Generator, **more: Any) -> Inverted:
        key = repr((settings, targets.tolist(), rng.initial_seed())).encode()
        if key not in memory:
            memory[key] = invert(ensemble, targets, *settings, rng=rng, **more)
        return memory[key]

    return invert_once


def run(script: str, about: str | None, one_seed: Callable[..., Part], *, takes_settings: bool = False) -> Rows:
    """Run `one_seed` for each seed of the command line, write the file after each, and give back all rows.

    With `takes_settings`, the command line may name a file of settings and single ones, which `one_seed` gets, flat.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once; each runs on one thread")
    parser.add_argument("--json", type=Path, required=True)
    if takes_settings:
        parser.add_argument("-c", "--config", type=Path, help="a file of settings")
        parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if takes_settings:
        flat = read_settings(arguments.config, arguments.settings, Config().to_flat())
        Config.from_flat(flat)  # refuses at once what is no setting
        one_seed = partial(one_seed, settings=flat)
    seeds = list(map(int, arguments.seeds.split(",")))
    command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    rows = finished(arguments.json, command, seeds)
    missing = [seed for seed in seeds if seed not in {row["seed"] for row in rows}]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for new, told in pool.map(one_seed, missing):
            rows += new
            content = {"command": command, "scripts": scripts(), **told, "rows": rows}
            write_text(arguments.json, json.dumps(content, indent=1) + "\n")
    return rows


def finished(path: Path, command: str, seeds: Sequence[int]) -> Rows:
    """What the same command has left in its file before it was stopped; after its end, nothing.

    With the same code, of the package and of the study, and the same versions of the libraries.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    rows: Rows = content["rows"]
    now = {"command": command, "scripts": scripts(), "fingerprint": fingerprint(), "versions": versions()}
    same = now.items() <= content.items()
    return rows if same and {row["seed"] for row in rows} != set(seeds) else []


def scripts() -> str:
    """12 hexadecimal characters over the modules of this folder that are in use."""
    files = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    own = sorted(path for path in files if path.parent == Path(__file__).parent)
    return hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest()[:12]

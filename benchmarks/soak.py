"""50 simulated clients of which 10 fail at random, through Flower's simulation engine; three times, and to the end.

Of the ten, by a draw of the seed, seven raise, two send NaN, and one takes its Ray actor with it. For each seed:

1. quorum 0.9: the run must fail, name the ten, and keep the 40 good uploads;
2. on a copy of that folder, quorum 0.8 and all ten still failing: it must complete with the 40;
3. resumed with quorum 0.92 while five still fail: it must fail, with 45;
4. resumed with quorum 1 and nobody failing: it must complete, in the bits of an undisturbed run.

The app is the checkout's, in a copy whose ClientApp has one modifier more, which makes the failures.

    python benchmarks/soak.py --seeds 0,1,2 --json benchmarks/results/faults/soak.json
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from markup import facts

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config
from fedmitr_flwr.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 50
KINDS = ["raises"] * 7 + ["nan"] * 2 + ["dies"]
SETTINGS: dict[str, object] = {
    "method": "fedavg",
    "device": "cpu",
    "threads": 1,
    "partition.scheme": "iid",
    "partition.clients": CLIENTS,
    "model.width": 16,
    "model.depth": 1,
    "model.patch-size": 4,
    "local.epochs": 2,
    "ensemble.weights": "size",
    "screen.mode": "off",
    "flower.node-wait": 900.0,
}

FAILING = '''"""Failures on order: FEDMITR_SOAK names a file of {client: kind}."""

import json
import os
import signal
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Array


def fail(message, context, call_next):
    plan = json.loads(Path(os.environ["FEDMITR_SOAK"]).read_text())
    kind = plan.get(str(context.node_config["partition-id"])) if message.metadata.message_type == "train" else None
    if kind == "raises":
        raise RuntimeError("this client fails on order")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    reply = call_next(message, context)
    if kind == "nan":
        arrays = reply.content["arrays"]
        name = next(iter(arrays))
        arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))
    return reply
'''


def app_that_fails(folder: Path) -> Path:
    """A copy of the app in `folder`, whose clients fail on order; which is then its folder."""
    for name in ("fedmitr_flwr", "fedmitr_ray", "server_app", "client_app"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "client_app" / "failing.py").write_text(FAILING)
    path, made = folder / "client_app" / "app.py", "app = ClientApp()\n"
    source = path.read_text()
    assert source.count(made) == 1
    path.write_text(source.replace(made, "from .failing import fail\n\napp = ClientApp(mods=[fail])\n"))
    return folder


class Soak:
    """One seed."""

    def __init__(self, app: Path, scratch: Path, seed: int) -> None:
        self.app, self.scratch = app, scratch / f"seed-{seed}"
        self.out = self.scratch / "runs"
        self.out.mkdir(parents=True)
        draw = random.Random(seed)
        self.plan = dict(zip(draw.sample(range(CLIENTS), len(KINDS)), draw.sample(KINDS, len(KINDS)), strict=True))
        self.config = Config.from_flat(SETTINGS | {"seed": seed, "out-dir": str(self.out)})
        self.straight = pipeline.run(
            Config.from_flat({"out-dir": str(self.scratch / "line")}, base=self.config), "line"
        )
        self.wanted = {client: _bits(path) for client, path in self.straight.upload_paths().items()}

    def flower(self, failing: Collection[int], changes: Mapping[str, object]) -> dict[str, Any]:
        """Run through Flower while these clients fail; what came of it."""
        plan = self.scratch / "plan.json"
        plan.write_text(json.dumps({client: self.plan[client] for client in failing}))
        words = [f"{key}={json.dumps(value)}" for key, value in {**self.config.to_flat(), **changes}.items()]
        command = [
            sys.executable,
            "-m",
            "fedmitr_flwr",
            "simulate",
            *words,
            f"--clients={CLIENTS}",
            f"--flwr-home={self.scratch}/home",
        ]
        started = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.scratch,
            env=os.environ | {"FEDMITR_SOAK": str(plan), "PYTHONPATH": str(self.app)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (self.scratch / "last.log").write_text(done.stdout)
        paths = set(re.findall(r"^run folder: (.+)$", done.stdout, re.MULTILINE))
        require("simulate", len(paths) == 1, f"not one run folder\n{done.stdout[-3000:]}")
        return {"log": done.stdout, "folder": RunFolder.open(paths.pop()), "status": done.returncode, "start": started}

    def step(
        self, name: str, failing: Collection[int], status: int, good: int, changes: Mapping[str, object]
    ) -> dict[str, Any]:
        """One run, which must end with this status and so many good uploads, all of them in the right bits."""
        outcome = self.flower(failing, changes)
        folder, log = outcome["folder"], outcome["log"]
        uploads = folder.upload_paths()
        missing = folder.missing()
        require(name, outcome["status"] == status, f"exit status {outcome['status']}\n{log[-3000:]}")
        require(name, len(uploads) == good and missing == sorted(failing), f"{len(uploads)} uploads, missing {missing}")
        require(name, all(_bits(path) == self.wanted[client] for client, path in uploads.items()), "other weights")
        if status:
            named = f"missing: clients {', '.join(map(str, missing))};"
            require(name, named in " ".join(log.split()), "the missing clients are not named")
        if not missing:
            require(name, _bits(folder.model_path) == _bits(self.straight.model_path), "another model")
        refused = len(list(folder.refused_path.glob("*.safetensors")))
        asked = re.findall(r"asking (\d+) of", log)
        return {
            "step": name,
            "failing": len(failing),
            "asked": int(asked[-1]) if asked else 0,
            "status": status,
            "uploads": len(uploads),
            "refused": refused,
            "seconds": round(time.monotonic() - outcome["start"], 1),
        }

    def run(self) -> list[dict[str, Any]]:
        failing = sorted(self.plan)
        first_try = self.step("quorum 0.9, ten fail", failing, 1, 40, {"flower.quorum": 0.9})
        (first,) = self.out.iterdir()
        copy = self.scratch / "copy" / first.name
        shutil.copytree(first, copy)
        of_copy = {"resume-from": str(copy), "flower.quorum": 0.8}
        of_first = {"resume-from": str(first)}
        return [
            first_try,
            self.step("copy resumed, quorum 0.8, ten fail", failing, 0, 40, of_copy),
            self.step("resumed, quorum 0.92, five fail", failing[:5], 1, 45, {**of_first, "flower.quorum": 0.92}),
            self.step("resumed, quorum 1, nobody fails", [], 0, CLIENTS, of_first),
        ]


def require(step: str, condition: bool, what: str) -> None:
    """Stop a soak that did not hold."""
    if not condition:
        raise SystemExit(f"soak: {step}: {what}")


def _bits(path: Path) -> dict[str, bytes]:
    tensors, _ = load_tensors(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedmitr-soak-") as scratch:
        app = app_that_fails(Path(scratch) / "fedmitr-flwr")
        for seed in map(int, options.seeds.split(",")):
            soak = Soak(app, Path(scratch), seed)
            for step in soak.run():
                rows.append({"seed": seed, **step})
                print(json.dumps(rows[-1]), flush=True)
            about = facts(soak.straight)
    command = f"python benchmarks/soak.py --seeds {options.seeds} --json {options.json}"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"command": command, **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

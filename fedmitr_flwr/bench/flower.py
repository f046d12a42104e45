"""One cell of Flower's own strategies, by the real app: `fedmitr simulate` as a process of its own."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..common.errors import RunError
from ..config import Config
from ..config.text import toml_value

COMMAND = (sys.executable, "-m", "fedmitr_flwr", "simulate")
STOP_SECONDS = 120.0  # it stops a SuperLink and Ray

Runner = Callable[[Config, Path], Path]  # (config, folder to work in) -> the run folder


def runner(client_gpus: float = 0.0) -> Runner:
    """Run a config through Flower, with this share of a GPU for each client."""
    return partial(_run, client_gpus=client_gpus)


def _run(config: Config, scratch: Path, client_gpus: float) -> Path:
    """Run; give the run folder, which lies in `scratch`.

    Raises:
        RunError: the run did not complete; the reason is Flower's.
    """
    settings, defaults = replace(config, out_dir=str(scratch)).to_flat(), Config().to_flat()
    words = [f"{key}={toml_value(value)}" for key, value in settings.items() if value != defaults[key]]
    command = [*COMMAND, *words]
    command += ["--clients", str(config.partition.clients), "--client-gpus", str(client_gpus)]
    log = scratch / "flower.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it stops what it has started
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    said = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^fedmitr: run folder: (.+)$", said, re.MULTILINE)
    if status or not found:
        reasons = re.findall(r"^fedmitr: error: (.+)$", said, re.MULTILINE) or said.strip().splitlines()[-1:]
        raise RunError(f"Flower: {(reasons or ['it said nothing'])[-1]} (its log, until the next try: {log})")
    return Path(found[-1])

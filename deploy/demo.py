#!/usr/bin/env python3
"""A deployment in small, on this machine's loopback: TLS, registered SuperNodes, each client with images of its own.

What `make deploy-demo` runs. Everything is started by deploy/*.sh, as deploy/README.md tells a system administrator to,
and has ended when this ends. The run folder stays.
"""

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy.demo_data import as_folders, as_parquet
from deploy.federation import ROOT, Federation
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.runs.folder import RunFolder

SITES = ("hospital-a", "factory", "university", "observatory", "library", "museum")
DIGITS = tuple("0123456789")

_FOLDER = b"fedmitr: run folder: "


def main(argv: Sequence[str] | None = None) -> int:
    """Return what the run returned: 0 if it completed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # everything is stopped in good order
    options = _parse(argv)
    names, started, folder = SITES[: options.clients], time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="fedmitr-demo-") as scratch:
        folders = make_sites(Path(scratch) / "images", names, options.images)
        with Federation(Path(scratch), show=True) as federation:
            for name, images in folders.items():
                federation.add(name, images)
            words = ["-c", str(ROOT / "configs/deployment.toml"), f"flower.clients={' | '.join(names)}"]
            with watched(federation) as peak:
                process = federation.run(*words, *options.settings, stdout=subprocess.PIPE)
                assert process.stdout is not None
                folder = passed_on(process.stdout)
                status: int = process.wait()
            print(federation.call("flwr", "supernode", "list", "federation"))
            if status:
                for who in ("server", *names):
                    print(
                        f"\n--- the end of {who}'s log\n",
                        *federation.log_of(who).read_text().splitlines()[-20:],
                        sep="\n",
                    )
    seconds = time.monotonic() - started
    print(f"demo: {seconds:.0f} s; peak memory of the ServerApp: {peak.get('flwr-serverapp', 0) / 1e9:.2f} GB")
    if options.json and not status:
        facts = told(RunFolder.open(folder).read_result(), peak, seconds)
        command = shlex.join(["python", "deploy/demo.py", *(sys.argv[1:] if argv is None else argv)])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"command": command, **facts}, indent=1) + "\n")
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run")
    parser.add_argument("--clients", type=int, default=3, choices=range(2, len(SITES) + 1), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="of each client; 0: all that there are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what it took, if it completed")
    return parser.parse_intermixed_args(argv)


def passed_on(lines: Iterable[bytes]) -> str:
    """Print a run's log as it comes; gives the run folder that it names, or nothing."""
    folder = ""
    for line in lines:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        if line.startswith(_FOLDER):
            folder = line.removeprefix(_FOLDER).decode().strip()
    return folder


def told(result: Mapping[str, Any], peak: Mapping[str, int], seconds: float) -> dict[str, Any]:
    """What a run took, and of which code, machine and settings; no path of this machine.

    Args:
        result: its result.json.
        peak: bytes by program.
        seconds: from before the first key was made until everything had ended.
    """
    config = {key: value for key, value in result["config"].items() if key not in ("out-dir", "resume-from")}
    about = {key: result[key] for key in ("fingerprint", "versions", "machine", "bytes_up")}
    return {**about, "config": config, "peak_bytes": dict(peak), "wall_seconds": round(seconds, 1)}


def make_sites(folder: Path, names: Sequence[str], most: int = 0) -> dict[str, Path]:
    """Deal scikit-learn's digits out to sites that keep them in their own ways, each with classes of its own.

    Site k of K has the five digits from 10 k / K on (9 is followed by 0), and shares each with the others that have it.
    """
    config = resolve(Config())
    images = load(config.data, config.model).train
    holders = {digit: [k for k in range(len(names)) if (digit - 10 * k // len(names)) % 10 < 5] for digit in range(10)}
    turns = dict.fromkeys(range(10), 0)
    rows: list[list[int]] = [[] for _ in names]
    for row, digit in enumerate(images.labels.tolist()):
        if holders[digit]:
            rows[holders[digit][turns[digit] % len(holders[digit])]].append(row)
            turns[digit] += 1
    made = {}
    for number, (name, own) in enumerate(zip(names, rows, strict=True)):
        share = images.subset(images.labels.new_tensor(own[: most or None]))
        write = (as_folders, as_parquet)[number % 2]
        made[name] = write(folder / name, share, DIGITS)
    return made


@contextlib.contextmanager
def watched(federation: Federation) -> Iterator[dict[str, int]]:
    """The most resident memory, in bytes, of each of Flower's programs while the block lasts; Linux only."""
    peak: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for title in ("flwr-serverapp", "flwr-clientapp", "flower-superlink"):
                for pid in federation.processes(title):
                    peak[title] = max(peak.get(title, 0), _peak_of(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # ended meanwhile
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    sys.exit(main())

"""What the tests of faults share: a run of a real federation that can be disturbed, and what is recorded of it."""

import contextlib
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from local_grid import TINY
from tiny import timeless

from deploy.federation import Federation
from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.config import Config
from fedmitr_flwr.runs.folder import RunFolder

PATIENCE = 900.0  # seconds for one step on a machine that is busy with other things
DEADLINE = 120.0  # in which `a` is done on any machine, and `b`, which is slowed down, on none
NAMES = ("a", "b")
DIGITS = tuple("0123456789")
SETTINGS: dict[str, Any] = TINY | {"method": "fedmitr", "data.train-limit": 0, "local.epochs": 400}
SETTINGS |= {"partition.scheme": "own", "partition.clients": len(NAMES), "flower.clients": " | ".join(NAMES)}
SETTINGS |= {"flower.node-wait": PATIENCE, "flower.upload-timeout": PATIENCE}
SETTINGS |= {"inversion.steps": 150, "inversion.batch-size": 10}
SETTINGS |= {"distill.rounds": 2, "distill.images-per-round": 20, "distill.epochs-per-round": 40}


@dataclass
class Row:
    """One line of docs/faults.md."""

    fault: str
    reads: list[str] = field(default_factory=list)
    disk: list[str] = field(default_factory=list)
    status: int = 0
    goes_on: str = ""
    asked: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    same_bits: bool = False
    code: str = field(default_factory=fingerprint)


def messages(log: str, out: Path) -> list[str]:
    """The warnings and errors in what the user sees, without colours, ids and this machine's paths."""
    wanted = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines()]
    wanted = [line for line in wanted if re.match(r"WARNING|ERROR|fedmitr: (error|the log)", line)]
    plain = [re.sub(r"^(WARNING|ERROR) *: *", "", line).replace(str(out), "OUT") for line in wanted]
    return list(dict.fromkeys(re.sub(r"\d{6,}", "N", re.sub(r"OUT/\w+-\d+|OUT/run", "RUN", line)) for line in plain))


def files_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("[!.]*")) if path.is_file()]


class Run:
    """`fedmitr simulate` as a process, and its output."""

    def __init__(self, stage: "Stage", settings: dict[str, Any]) -> None:
        self.path = stage.folder / f"run-{len(list(stage.folder.glob('run-*')))}.log"
        words = [f"{key}={value}" for key, value in settings.items()]
        with self.path.open("wb") as log:
            self.process = stage.federation.run(*words, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.path.read_text(errors="replace"))

    def end(self) -> int:
        return int(self.process.wait(PATIENCE))


class Stage:
    """One case: its run, its row of the table, and what to wait for."""

    def __init__(self, federation: Federation, folder: Path, undisturbed: RunFolder, row: Row) -> None:
        self.federation, self.folder, self.undisturbed, self.row = federation, folder, undisturbed, row
        self.out = folder / "runs"
        self.marks = {who: len(self._node_log(who)) for who in NAMES}
        self.runs: list[Run] = []

    def start(self, **settings: Any) -> Run:
        self.runs.append(Run(self, SETTINGS | {"out-dir": str(self.out)} | settings))
        return self.runs[-1]

    def resume(self, **settings: Any) -> Run:
        return self.start(**settings, **{"resume-from": str(self.run_folder().path)})

    def run_folder(self) -> RunFolder:
        (path,) = self.out.iterdir()
        return RunFolder.open(path)

    def prepared(self) -> RunFolder:
        """A run folder that has all uploads, as after a server that died at once."""
        config = Config.from_flat({"out-dir": str(self.out)}, base=self.undisturbed.config)
        folder = RunFolder.create(config, "run")
        shutil.copytree(self.undisturbed.uploads_path, folder.uploads_path, dirs_exist_ok=True)
        return folder

    def _node_log(self, who: str) -> str:
        return self.federation.log_of(who).read_text(errors="replace")

    def log_of(self, who: str) -> str:
        """The log of one SuperNode since this case began."""
        return self._node_log(who)[self.marks[who] :]

    def trained(self) -> list[str]:
        """Who began to train since this case began, once for each time."""
        return [who for who in NAMES for _ in re.findall(r"client \d+: training on", self.log_of(who))]

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}: not in time\n{self.runs[-1].log}\n{self.log_of('b')}"
            assert self.runs[-1].process.poll() is None, f"{what}: the run has ended\n{self.runs[-1].log}"
            time.sleep(0.05)
        return value

    def has_uploaded(self, client: int) -> bool:
        folders = list(self.out.glob("*/config.toml"))
        return bool(folders) and client in self.run_folder().upload_paths()

    def disturbed(self, run: Run, status: int = 1) -> None:
        """Record what the user reads and what is on disk after a run that was disturbed."""
        assert run.end() == status, run.log
        self.row.status, self.row.reads = status, messages(run.log, self.out)
        self.row.disk = files_in(self.run_folder().path)

    def completed(self, run: Run, goes_on: str, asked: list[str], trained: list[str]) -> None:
        """The run must have ended in the undisturbed bits, after asking and training these clients and no others."""
        assert run.end() == 0, run.log
        folder = self.run_folder()
        numbers = re.findall(r"asking \d+ of \d+ clients: \[([\d, ]*)\]", run.log)
        self.row.asked = [NAMES[int(number)] for number in (numbers[-1].split(", ") if numbers else [])]
        self.row.goes_on, self.row.trained = goes_on, self.trained()
        assert (self.row.asked, self.row.trained) == (asked, trained)
        for name in ("model.safetensors", "pool.safetensors"):
            assert timeless(folder.path / name) == timeless(self.undisturbed.path / name), name
        for client, path in folder.upload_paths().items():
            assert timeless(path) == timeless(self.undisturbed.upload_paths()[client]), path
        assert folder.finished
        assert not folder.work_path.exists()
        self.row.same_bits = True


@contextlib.contextmanager
def slowed(federation: Federation, who: str) -> Iterator[None]:
    """Let a client work half a second in ten, so that it still sends its signs of life."""
    done = threading.Event()

    def hold() -> None:
        while not done.is_set():
            for number, seconds in ((signal.SIGSTOP, 9.5), (signal.SIGCONT, 0.5)):
                federation.send(number, "flwr-clientapp", who)
                done.wait(seconds)
        federation.send(signal.SIGCONT, "flwr-clientapp", who)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A disk of its own for a folder; the machine's administrator can make one."""
    path.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path) -> Path:
    """Take all room that is left on a disk."""
    target = path / ".filler"
    with contextlib.suppress(OSError), target.open("wb", buffering=0) as file:  # nothing is left to write at the end
        while True:
            file.write(bytes(1024))
    return target

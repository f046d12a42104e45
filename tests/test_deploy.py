"""Faults of a deployment, for real: processes are killed, machines restarted and disks filled while SuperNodes train.

Every case is a run that is disturbed and, where that ended it, its resumption. The weights must come out as those of an
undisturbed run, bit by bit, and nobody may train what is on disk already. What happened is recorded for docs/faults.md.

Excluded unless asked for by `-m deploy`. Nothing here depends on how fast the machine is: every step waits for the one
before it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_grid import TINY, server_context, task_identity
from sites import Sites, named
from tiny import timeless

from deploy.demo_data import as_parquet
from deploy.federation import Federation
from fedmitr_flwr.config import Config, DataConfig, ModelConfig
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.report.run_folder import RunFolder
from server_app.app import app as server_app

pytestmark = pytest.mark.deploy

PATIENCE = 900.0  # seconds for one step on a machine that is busy with other things
DEADLINE = 120.0  # in which `a` is done on any machine, and `b`, which is slowed down, on none
NAMES = ("a", "b")
DIGITS = tuple("0123456789")
SETTINGS: dict[str, Any] = TINY | {
    "method": "fedmitr",
    "data.train-limit": 0,
    "partition.scheme": "own",
    "partition.clients": len(NAMES),
    "flower.clients": " | ".join(NAMES),
    "flower.node-wait": PATIENCE,
    "flower.upload-timeout": PATIENCE,
    "local.epochs": 400,
    "inversion.steps": 150,
    "inversion.batch-size": 10,
    "distill.epochs": 2,
    "distill.images-per-epoch": 20,
    "distill.passes": 40,
}


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


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """What happened; written to the file that FEDMITR_FAULTS names, beside the rows of other cases there."""
    rows: list[Row] = []
    yield rows
    if target := os.environ.get("FEDMITR_FAULTS"):
        path = Path(target)
        known = json.loads(path.read_text()) if path.exists() else []
        new = {row.fault: asdict(row) for row in rows}
        kept = [new.pop(row["fault"], row) for row in known]
        path.write_text(json.dumps([*kept, *new.values()], indent=1) + "\n")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a` has few images and is soon done, `b` has more and other classes."""
    images, root = load(DataConfig(), ModelConfig()).train, tmp_path_factory.mktemp("sites")
    shares = {"a": (images.labels < 5).nonzero().flatten()[:30], "b": (images.labels > 3).nonzero().flatten()[:150]}
    return {name: as_parquet(root / name, images.subset(rows), DIGITS) for name, rows in shares.items()}


@pytest.fixture(scope="module")
def federation(sites: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("federation")) as started:
        for name, images in sites.items():
            started.add(name, images)
        yield started


@pytest.fixture(scope="module")
def undisturbed(sites: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same experiment in this process, where nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed")
    grid = Sites(named(NAMES, list(sites.values())))
    with task_identity(), pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLWR_HOME", str(out / "home"))
        server_app(grid, server_context(SETTINGS | {"out-dir": str(out / "runs")}))
    (path,) = (out / "runs").iterdir()
    return RunFolder.open(path)


class Run:
    """`flower_run` as a process, and its output."""

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

    def told(self, who: str) -> str:
        """The log of one SuperNode since this case began."""
        return self._node_log(who)[self.marks[who] :]

    def trained(self) -> list[str]:
        """Who began to train since this case began, once for each time."""
        return [who for who in NAMES for _ in re.findall(r"client \d+: training on", self.told(who))]

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}: not in time\n{self.runs[-1].log}\n{self.told('b')}"
            assert self.runs[-1].process.poll() is None, f"{what}: the run has ended\n{self.runs[-1].log}"
            time.sleep(0.05)
        return value

    def has_uploaded(self, client: int) -> bool:
        folders = list(self.out.glob("*/config.toml"))
        return bool(folders) and client in self.run_folder().upload_paths()

    def disturbed(self, run: Run, status: int = 1) -> None:
        """Record what the user reads and what is on disk after a run that was disturbed."""
        assert run.end() == status, run.log
        self.row.status, self.row.reads = status, self.messages(run)
        root = self.run_folder().path
        files = [path.relative_to(root) for path in sorted(root.rglob("[!.]*")) if path.is_file()]
        self.row.disk = [str(path) for path in files]

    def messages(self, run: Run) -> list[str]:
        """The warnings and errors in what the user sees, without times, ids and this machine's paths."""
        lines = [line.strip() for line in run.log.splitlines()]
        wanted = [line for line in lines if re.match(r"WARNING|ERROR|flower_run: (error|the log)", line)]
        plain = [re.sub(r"^(WARNING|ERROR) *: *", "", line).replace(str(self.out), "OUT") for line in wanted]
        plain = [re.sub(r"\d{6,}", "N", re.sub(r"OUT/\w+-\d+", "RUN", line)) for line in plain]
        return list(dict.fromkeys(plain))

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


Set = Callable[[str], Stage]


@pytest.fixture
def stage(federation: Federation, undisturbed: RunFolder, table: list[Row], tmp_path: Path) -> Iterator[Set]:
    """Begin a case by the name of its fault."""
    begun: list[Stage] = []

    def begin(fault: str) -> Stage:
        begun.append(Stage(federation, tmp_path, undisturbed, Row(fault)))
        return begun[-1]

    yield begin
    for each in begun:
        for run in each.runs:
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
        if each.row.same_bits:
            table.append(each.row)
    for name in NAMES:  # the next case finds everybody there
        federation.send(signal.SIGCONT, "flwr-clientapp", name)
        if federation.nodes[name].poll() is not None:
            federation.start_node(name)


@pytest.mark.smoke
def test_nothing_happens(stage: Set) -> None:
    case = stage("nothing")
    run = case.start()
    case.disturbed(run, 0)
    case.completed(run, "completes", ["a", "b"], ["a", "b"])


@pytest.mark.smoke
def test_a_client_raises(stage: Set, sites: dict[str, Path]) -> None:
    """One image of its is broken; it is mended, and the run resumed."""
    case = stage("a client raises (a broken image)")
    path = sites["b"] / "train.parquet"
    whole, table = path.read_bytes(), pq.read_table(path)
    cells = table.column("image").to_pylist()
    cells[-1]["bytes"] = b"no picture"
    pq.write_table(table.set_column(0, table.schema.field(0), pa.array(cells, table.schema.field(0).type)), path)
    case.disturbed(case.start())
    path.write_bytes(whole)
    case.completed(case.resume(), "resume-from", ["b"], ["a", "b"])


def test_a_supernode_is_killed_in_training(stage: Set, federation: Federation) -> None:
    case = stage("SuperNode killed (its machine loses power) while its client trains")
    run = case.start()
    case.wait_for(lambda: "b" in case.trained(), "b trains")
    federation.send(signal.SIGKILL, who="b")
    federation.nodes["b"].wait()
    case.disturbed(run)
    federation.start_node("b")
    case.completed(case.resume(), "SuperNode started again, resume-from", ["b"], ["a", "b", "b"])


def test_a_clientapp_is_killed_in_training(stage: Set, federation: Federation) -> None:
    case = stage("ClientApp process killed (out of memory) while it trains")
    run = case.start()
    case.wait_for(lambda: "b" in case.trained(), "b trains")
    federation.send(signal.SIGKILL, "flwr-clientapp", "b")
    case.disturbed(run)
    case.completed(case.resume(), "resume-from", ["b"], ["a", "b", "b"])


def test_a_client_is_slower_than_the_deadline(stage: Set, federation: Federation) -> None:
    """It trains on behind the end of the run, and sends what it has made when it is asked again."""
    case = stage("client slower than flower.upload-timeout")
    run = case.start(**{"flower.upload-timeout": DEADLINE})
    case.wait_for(lambda: "b" in case.trained(), "b trains")
    with slowed(federation, "b"):
        case.disturbed(run)
    case.completed(case.resume(), "resume-from", ["b"], ["a", "b"])


def test_the_serverapp_is_killed_in_upload(stage: Set, federation: Federation) -> None:
    case = stage("ServerApp killed while uploads come in")
    run = case.start()
    case.wait_for(lambda: case.has_uploaded(0), "a uploads")
    federation.send(signal.SIGKILL, "flwr-serverapp")
    case.disturbed(run)
    assert list(case.run_folder().upload_paths()) == [0]
    case.completed(case.resume(), "resume-from", ["b"], ["a", "b"])


def test_the_superlink_is_restarted_while_clients_train(stage: Set, federation: Federation) -> None:
    case = stage("SuperLink restarted, with its database, while clients train")
    run = case.start()
    case.wait_for(lambda: "b" in case.trained(), "b trains")
    assert federation.link is not None
    federation.link.kill()
    federation.link.wait()
    federation.start_link()
    case.disturbed(run, 0)
    case.completed(run, "goes on by itself", ["a", "b"], ["a", "b"])


@pytest.mark.parametrize(
    ("phase", "pieces"), [("inversion", ["images-0-0"]), ("distillation", ["images-0-0", "images-0-1"])]
)
def test_the_serverapp_is_killed_in_the_server_phase(
    stage: Set, federation: Federation, phase: str, pieces: list[str]
) -> None:
    case = stage(f"ServerApp killed in {phase}")
    folder = case.prepared()
    run = case.resume()
    case.wait_for(lambda: all((folder.work_path / f"{piece}.safetensors").exists() for piece in pieces), phase)
    federation.send(signal.SIGKILL, "flwr-serverapp")
    case.disturbed(run)
    assert [path.stem for path in sorted(folder.work_path.glob("*.safetensors"))] == pieces
    case.completed(case.resume(), "resume-from", [], [])
    assert "batch 1 is of an earlier start" in case.runs[-1].log


@contextlib.contextmanager
def slowed(federation: Federation, who: str) -> Iterator[None]:
    """Let a client work one second in six, so that it still sends its signs of life."""
    done = threading.Event()

    def hold() -> None:
        while not done.is_set():
            for number, seconds in ((signal.SIGSTOP, 5.0), (signal.SIGCONT, 1.0)):
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
    with target.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
            file.flush()
    return target


def test_the_disk_is_full_when_an_upload_comes(stage: Set) -> None:
    case = stage("disk of the run folder full when an upload comes, and room made later")
    with small_disk(case.out, "4m"):
        run = case.start()
        case.wait_for(lambda: case.trained(), "somebody trains")
        filler = fill(case.run_folder().path)
        case.wait_for(lambda: "held in memory" in run.log, "the disk is full")
        assert case.run_folder().upload_paths() == {}
        filler.unlink()
        case.disturbed(run, 0)
        case.completed(run, "goes on by itself", ["a", "b"], ["a", "b"])


def test_the_disk_is_full_in_the_server_phase(stage: Set) -> None:
    case = stage("disk of the run folder full in the server phase")
    with small_disk(case.out, "4m"):
        folder = case.prepared()
        filler = fill(folder.path)
        case.disturbed(case.resume())
        filler.unlink()
        assert not list(folder.path.rglob("*.tmp"))
        case.completed(case.resume(), "room made, resume-from", [], [])

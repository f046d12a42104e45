"""Faults of a deployment, for real: processes are killed, machines restarted and disks filled while SuperNodes train.

Every case is a run that is disturbed and, where that ended it, its resumption. The weights must come out as those of an
undisturbed run, bit by bit, and nobody may train what is on disk already. What happened is recorded for docs/faults.md.

Excluded unless asked for by `-m deploy`. Nothing here depends on how fast the machine is: every step waits for the one
before it.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import DEADLINE, DIGITS, NAMES, SETTINGS, Row, Stage, files_in, fill, messages, slowed, small_disk
from local_grid import TINY, Sites, federate, named
from test_flwr_run import SLOW, a_killed_client, only_it_is_asked_again
from test_flwr_run import Run as SimulatedRun
from tiny import small, timeless

from deploy.demo_data import as_parquet
from deploy.federation import Federation
from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config, DataConfig
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.runs.folder import RunFolder

pytestmark = pytest.mark.deploy


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*kept, *new.values()], indent=1) + "\n")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a` has few images and is soon done, `b` has more and other classes."""
    images, root = load(DataConfig(), small()).train, tmp_path_factory.mktemp("sites")
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
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLWR_HOME", str(out / "home"))
        return federate(out / "runs", Sites(named(NAMES, list(sites.values()))), **SETTINGS)


Set = Callable[[str], Stage]


@pytest.fixture
def stage(federation: Federation, undisturbed: RunFolder, table: list[Row], tmp_path: Path) -> Iterator[Set]:
    """Begin a case by the name of its fault."""
    begun: list[Stage] = []

    def begin(fault: str) -> Stage:
        for name in NAMES:  # no client has kept an upload of an earlier case
            shutil.rmtree(federation.folder / name / "fedmitr", ignore_errors=True)
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


POWER = "SuperNode killed (its machine loses power) while its client trains"
MEMORY = "ClientApp process killed (out of memory) while it trains"


@pytest.mark.parametrize(
    ("fault", "program", "goes_on"),
    [(POWER, "", "SuperNode started again, resume-from"), (MEMORY, "flwr-clientapp", "resume-from")],
)
def test_a_client_is_killed_in_training(
    stage: Set, federation: Federation, fault: str, program: str, goes_on: str
) -> None:
    case = stage(fault)
    run = case.start()
    case.wait_for(lambda: "b" in case.trained(), "b trains")
    federation.send(signal.SIGKILL, program, "b")
    if not program:
        federation.nodes["b"].wait()
    case.disturbed(run)
    if not program:
        federation.start_node("b")
    case.completed(case.resume(), goes_on, ["b"], ["a", "b", "b"])


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
    if run.end() == 0:  # where nobody reaps the SuperExec, the ServerApp does not notice that it is gone
        case.disturbed(run, 0)
        case.completed(run, "goes on by itself", ["a", "b"], ["a", "b"])
    else:
        case.disturbed(run)
        missing = [NAMES[client] for client in case.run_folder().missing()]
        case.completed(case.resume(), "SuperLink started again, resume-from", missing, ["a", "b"])


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


def test_a_ray_actor_is_killed_in_simulation(table: list[Row], tmp_path: Path) -> None:
    """Flower gives the next clients to the dead actor; they are asked again, and only its own client is lost."""
    row = Row("one Ray actor killed in simulation (Flower hands it the next clients, too)", status=1)
    out = tmp_path / "runs"
    out.mkdir()

    def start(clients: int, **settings: Any) -> SimulatedRun:
        return SimulatedRun(out, tmp_path / "home", clients, settings)

    run, folder, missing = a_killed_client(start)
    row.reads, row.disk = messages(run.log, out), files_in(folder.path)
    again = only_it_is_asked_again(start, folder, missing)
    row.goes_on, row.asked, row.trained = "resume-from", again.trained, sorted([*run.trained, *again.trained])
    config = Config.from_flat(TINY | SLOW | {"partition.clients": 4, "out-dir": str(tmp_path / "line")})
    straight = pipeline.run(config, "line")
    assert timeless(folder.model_path) == timeless(straight.model_path)
    row.same_bits = True
    table.append(row)

"""Whole runs by `flwr run` on Ray, through `fedmitr simulate`: the straight line's bits, an honest exit status."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from local_grid import TINY
from tiny import ROOT, contents

from fedmitr_flwr import pipeline
from fedmitr_flwr.cli import main
from fedmitr_flwr.config import Config
from fedmitr_flwr.flower import simulate
from fedmitr_flwr.flower.processes import command_of, marked, of_sessions, session_of
from fedmitr_flwr.runs.folder import RunFolder

pytestmark = pytest.mark.slow

MARK = "FEDMITR_TEST"
PATIENCE = 900.0  # seconds for one step on a machine that is busy with other things


class Run:
    """`fedmitr simulate` as a process of its own, its log, and the processes that it caused."""

    def __init__(self, out: Path, home: Path, clients: int, settings: Mapping[str, Any]) -> None:
        self.out, self.mark, self.lines = out, uuid.uuid4().hex, list[str]()
        self.sessions: set[int] = set()
        flat = {**TINY, "out-dir": out, "flower.node-wait": 120.0, **settings}
        words = [f"--clients={clients}", f"--flwr-home={home}", *(f"{key}={value}" for key, value in flat.items())]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedmitr_flwr", "simulate", *words],
            cwd=out.parent,
            env=os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self.processes("")  # to learn the sessions while it runs

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def trained(self) -> list[str]:
        return re.findall(r"client (\d+): training on", self.log)

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for the exit status; whatever the run started must be gone with it."""
        status = self.process.wait(seconds)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert self.processes("") == []
        return status

    def processes(self, title: str) -> list[int]:
        """Ids of our processes whose command line holds `title`. Ray's overwrite their environment with a title."""
        self.sessions |= {session_of(pid) for pid in marked(f"{MARK}={self.mark}")} - {0}
        return sorted(pid for pid in of_sessions(self.sessions) if title in command_of(pid))

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)
        return value

    def kill(self, title: str) -> None:
        """End one of these processes a moment after it is there."""
        first = self.wait_for(lambda: self.processes(title))[0]
        time.sleep(1)
        os.kill(first, signal.SIGKILL)

    def folder(self) -> Any:
        """The newest run folder; None until it is there."""
        found = [path for path in self.out.glob("*") if (path / "config.toml").exists()]
        return RunFolder.open(max(found, key=lambda path: path.stat().st_mtime)) if found else None


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin(clients: int = 3, **settings: Any) -> Run:
        runs.append(Run(tmp_path / "out", tmp_path / "home", clients, settings))
        return runs[-1]

    (tmp_path / "out").mkdir()
    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(60)


def test_bad_input_that_the_server_app_finds_is_told_from_a_failure() -> None:
    seen = simulate.Seen()
    lines = [b"Successfully started run 42\n", b"INFO : run folder: /runs/a b\n", b"ERROR : bad input: lr = 'x'\n"]
    simulate._show(io.BytesIO(b"".join(lines[:2])), seen)
    assert seen == simulate.Seen("42", "/runs/a b", False)
    simulate._show(io.BytesIO(lines[2]), seen)
    assert seen.bad_input


def test_escapes_are_for_terminals() -> None:
    coloured = b"\x1b[92mINFO \x1b[0m:      \x1b[?25l\x1b[1;36m5\x1b[0m\xe2\x94\x81\n"
    assert simulate.shown(coloured, colours=True) == coloured
    assert simulate.shown(coloured, colours=False) == b"INFO :      5\xe2\x94\x81\n"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"local.epochz": 3}, "unknown config key 'local.epochz'; did you mean local.epochs?"),
        ({"data.source": "parquet", "data.path": "nowhere"}, "nowhere"),
        ({"partition.clients": "3 --clients=4"}, "--clients 4 and partition.clients=3; give one of them"),
        ({"seed": "1 --client-gpus=-1"}, "--client-gpus -1 is not possible"),
        ({"seed": "1 --flwr-home=/proc/none"}, "--flwr-home: cannot make the folder /proc/none"),
        ({"partition.scheme": "own", "data.train-limit": 0}, "name their --superlink"),
    ],
)
def test_what_is_seen_without_a_client_fails_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], told: str
) -> None:
    flat = {**TINY, "out-dir": tmp_path / "out", **settings}
    words = " ".join(f"{key}={value}" for key, value in flat.items()).split()
    assert main(["simulate", f"--flwr-home={tmp_path / 'home'}", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("fedmitr: error: ")
    assert told in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


SLOW = {"local.epochs": 600}


def a_killed_client(start: Start) -> tuple[Run, RunFolder, int]:
    """A run of four in which one Ray actor is killed: it costs the client that it ran, which is the number given."""
    run = start(clients=4, **SLOW)
    run.wait_for(run.folder)
    run.kill("ray::ClientAppActor.run")
    assert run.end() == 1
    folder = run.folder()
    (missing,) = folder.missing()
    assert re.search(f"fedmitr: error: .*3 of 4 uploads .* missing: client {missing};", run.log)
    return run, folder, missing


def only_it_is_asked_again(start: Start, folder: RunFolder, missing: int) -> Run:
    before = {client: path.stat().st_mtime_ns for client, path in folder.upload_paths().items()}
    again = start(clients=4, **SLOW, **{"resume-from": str(folder.path)})
    assert again.end() == 0, again.log
    assert f"asking 1 of 4 clients: [{missing}]" in again.log
    assert again.trained == [str(missing)]
    after = {client: path.stat().st_mtime_ns for client, path in folder.upload_paths().items()}
    assert after.items() > before.items()
    assert folder.finished
    return again


@pytest.mark.deploy
@pytest.mark.smoke
def test_a_killed_client_costs_itself_only_and_is_asked_again(start: Start, tmp_path: Path) -> None:
    run, folder, missing = a_killed_client(start)
    (kept,) = (tmp_path / "home").glob("superlink-*.log")
    assert f"fedmitr: the SuperLink's log is kept, since the run failed: {kept}" in run.log
    only_it_is_asked_again(start, folder, missing)


@pytest.mark.deploy
@pytest.mark.smoke
def test_a_killed_server_resumes_without_the_clients_and_gives_the_bits_of_the_straight_line(
    start: Start, tmp_path: Path
) -> None:
    run = start(method="fedmitr", **{"inversion.steps": 200_000})
    folder = run.wait_for(run.folder)
    run.wait_for(lambda: not folder.missing())
    run.kill("flwr-simulation")
    assert run.end() == 1
    assert not folder.finished

    again = start(method="fedmitr", **{"resume-from": str(folder.path)})
    assert again.end() == 0, again.log
    assert again.trained == []
    assert f"run folder: {folder.path}" in again.lines[-1]
    assert "finished:completed" in again.lines[-2]
    settings = TINY | {"method": "fedmitr", "partition.clients": 3, "out-dir": str(tmp_path / "line")}
    straight = pipeline.run(Config.from_flat(settings), "line")
    assert contents(folder) == contents(straight)
    assert folder.read_result()["accuracy"] == straight.read_result()["accuracy"]


def test_an_interrupted_run_leaves_nothing_behind(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')  # one actor, not one per core: each imports PyTorch
    run = start(clients=2, **{"local.epochs": 100_000})
    folder = run.wait_for(run.folder)
    assert run.processes("ray::ClientAppActor")
    asked = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.end(180) == 130
    assert time.monotonic() - asked < 10  # on a busy machine
    assert "fedmitr: interrupted; ending what it has started\n" in run.lines
    assert run.lines[-1] == (
        f"fedmitr: interrupted; the same command goes on with resume-from={folder.path} (run folder: {folder.path})\n"
    )
    assert not list((tmp_path / "home").glob("superlink-*.log"))

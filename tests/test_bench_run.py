"""Running a grid: shared uploads, what is skipped, what fails, who may work beside whom, and starting again."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
from tiny import ROOT

from fedmitr_flwr import cli, judge, pipeline
from fedmitr_flwr.bench import command
from fedmitr_flwr.bench import flower as real_flower
from fedmitr_flwr.bench import run as running
from fedmitr_flwr.bench import store as storing
from fedmitr_flwr.bench.grid import Cell, cells, tune_cells
from fedmitr_flwr.bench.known import adopt, chosen_in
from fedmitr_flwr.bench.results import load
from fedmitr_flwr.bench.spec import Bench, read
from fedmitr_flwr.bench.store import Store
from fedmitr_flwr.common.errors import ConfigError, RunError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config
from fedmitr_flwr.methods.rounds import Rounds
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.result import build
from fedmitr_flwr.uploads.upload import size

SMALL = """
[settings]
device = "cpu"
threads = 1
data = {train-limit = 120, test-limit = 40}
model = {width = 16, depth = 1, patch-size = 4}
local.epochs = 1
inversion.steps = 4
distill = {rounds = 2, images-per-round = 10, epochs-per-round = 1}
"""
GRID = '[grid]\npartition = ["dirichlet", "iid"]\nclients = [3]\nmethods = ["fedavg", "lda", "fedmitr"]\nseed = [0, 1]'
ONE_PLACE = GRID.replace('"dirichlet", ', "").replace("[0, 1]", "[0]")
Made = Callable[[], tuple[int, int]]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take longer than all else."""
    monkeypatch.setattr(command, "draw", lambda *_: 0)


def a_bench(folder: Path, grid: str = GRID, top: str = "") -> Path:
    path = folder / "tiny.toml"
    path.write_text(top + SMALL + grid)
    return path


def tiny(folder: Path, grid: str = GRID) -> tuple[Bench, Store]:
    return read(a_bench(folder, grid)), Store(folder / "out")


def no_flower(config: Config, scratch: Path) -> Path:
    raise AssertionError(f"Flower was called in {scratch} for {config}")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """How many uploads and fusions have really been made."""
    spies = [Mock(wraps=pipeline.train_client), Mock(wraps=pipeline.fuse)]
    monkeypatch.setattr(pipeline, "train_client", spies[0])
    monkeypatch.setattr(pipeline, "fuse", spies[1])
    return lambda: (spies[0].call_count, spies[1].call_count)


def test_nothing_is_made_twice(tmp_path: Path, made: Made, caplog: pytest.LogCaptureFixture) -> None:
    """A cell is what one run alone would be: neither weights nor counted bytes show that more is uploaded."""
    caplog.set_level(logging.INFO, "fedmitr.bench")
    spec, store = tiny(tmp_path, GRID.replace('"dirichlet", ', ""))
    tally = running.run(spec, store, no_flower)
    assert (tally.total, tally.done, tally.failed) == (6, 6, 0)
    assert made() == (2 * 3, 6)  # seeds, clients
    assert len({store.result(cell)["partition_sha256"] for cell in cells(spec)}) == 2
    told = [record.message for record in caplog.records if record.name == "fedmitr.bench"]
    assert re.search(r"\[6/6\] digits, IID, K 3, seed 1, fedmitr: \d+\.\d\d % in 0:\d\d; the last one", told[-1])
    assert re.search(r"\[1/6\] .*; about \d+:\d\d left", told[0])
    assert running.run(spec, store, no_flower).failed == 0
    assert made() == (6, 6)
    assert caplog.text.count("finished before") == 6
    place = {cell.label: store.place(cell) for cell in cells(spec) if cell.seed == 0}
    config = Config.from_file(place["fedmitr"] / "config.toml")
    alone = pipeline.run(replace(config, out_dir=str(tmp_path / "alone")), "alone")
    for name in ("model.safetensors", "pool.safetensors"):
        assert (place["fedmitr"] / name).read_bytes() == (alone.path / name).read_bytes()
    assert alone.partition_path.exists()
    assert not (place["fedmitr"] / "partition.png").exists()  # one of many
    ours, theirs = RunFolder.open(place["fedmitr"]).read_result(), alone.read_result()
    for key in ("accuracy", "bytes_up", "confusion", "partition_sha256", "counts"):
        assert ours[key] == theirs[key], key
    lda = RunFolder.open(place["lda"]).read_result()
    assert lda["bytes_statistics"][0] == lda["bytes_up"][0] - ours["bytes_up"][0] > 0
    whole = load_tensors(place["fedmitr"].parents[1] / "uploads" / "client_000.safetensors")[0]
    assert size(whole) > lda["bytes_up"][0]  # the variances are there for fedpft


class Slow:
    """A stand-in of `run.make` that takes a moment, for a cell that nobody else is at; `before` is called first."""

    def __init__(self) -> None:
        self.made, self.at_work, self.before = list[str](), set[str](), Mock()

    def __call__(self, cell: Cell, store: Store, *_: Any, **__: Any) -> dict[str, Any]:
        self.before(cell)
        key = store.place(cell).as_posix()
        assert key not in self.at_work
        self.at_work.add(key)
        time.sleep(0.02)
        result = build(config=cell.config, device="cpu", bytes_up=[1], seconds={}, student=50.0, local=[1.0])
        store.place(cell).mkdir(parents=True, exist_ok=True)
        (store.place(cell) / "result.json").write_text(json.dumps(result))
        self.made.append(key)
        self.at_work.remove(key)
        return result


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow()
    monkeypatch.setattr(running, "make", made)
    return made


def test_a_grid_of_which_a_part_was_started_meanwhile_has_a_table_of_all_of_it(tmp_path: Path, slow: Slow) -> None:
    def a_part(cell: Cell) -> None:
        if (cell.seed, cell.label) == (0, "fedmitr"):
            part = replace(spec, seeds=(1,))
            assert running.run(part, Store(out), no_flower).total == len(load(out).entries) == 6

    spec, out, slow.before = read(a_bench(tmp_path)), tmp_path / "out", a_part
    assert running.run(spec, Store(out), no_flower).total == len(load(out).entries) == 12
    assert not load(out).missing


@pytest.mark.usefixtures("capsys")
def test_a_failed_cell_is_noted_and_the_grid_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = ONE_PLACE.replace('"lda"', '"bad"') + '\n[methods.bad]\nmethod = "fedmitr"\ndistill.lr = 1e30'
    out = tmp_path / "out"
    words = ["bench", str(a_bench(tmp_path, bad)), "--out", str(out)]
    assert cli.main(words) == 1
    assert len(load(out).entries) == 2
    assert [place["label"] for place in load(out).missing] == ["bad"]
    (text,) = (note.read_text() for note in (out / "failed").iterdir())
    assert re.match("digits, IID, K 3, seed 0, bad\nRunError: .*the student diverged", text)
    assert "distill.lr = 1e+30" in text
    assert "Traceback" not in text  # bad input is one line
    assert "Cells without a result: 1 (`bad` 1)." in (out / "table.md").read_text()
    slow = Slow()
    monkeypatch.setattr(running, "make", slow)  # as if it did not diverge now
    assert cli.main(words) == 0
    assert len(slow.made) == 1  # only what had failed
    assert (list((out / "failed").iterdir()), len(load(out).entries)) == ([], 3)
    spec, store = tiny(tmp_path, ONE_PLACE)
    monkeypatch.setattr(running, "make", Mock(side_effect=ZeroDivisionError("by hand")))
    assert running.run(spec, replace(store, path=tmp_path / "bug"), no_flower).failed == 3
    text = next((tmp_path / "bug" / "failed").iterdir()).read_text()
    assert re.match(r".*\nZeroDivisionError: by hand\n\nTraceback", text)


def table_of(out: Path) -> list[list[str]]:
    """The table without what a clock or a memory gauge tells."""
    command.write(out, out)
    head, *lines = [line.split(",") for line in (out / "table.csv").read_text().splitlines()]
    timeless = [place for place, name in enumerate(head) if "seconds" not in name and "peak" not in name]
    return [[line[place] for place in timeless] for line in lines]


def second_stops(real: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose second call is interrupted."""
    again = Mock(side_effect=[None, KeyboardInterrupt])
    return lambda *args, **named: (again(), real(*args, **named))[1]


def test_stopped_anywhere_and_started_again_gives_the_same_table(tmp_path: Path) -> None:
    spec = read(a_bench(tmp_path, ONE_PLACE))
    running.run(spec, Store(tmp_path / "whole"), no_flower)
    places: list[tuple[Any, str]] = [(pipeline, "train_local"), (Rounds, "images"), (judge, "evaluate")]
    for module, where in (*places, (RunFolder, "write_result")):
        store = Store(tmp_path / where)
        with patch.object(module, where, second_stops(getattr(module, where))), pytest.raises(KeyboardInterrupt):
            running.run(spec, store, no_flower)
        assert not all(store.result(cell) for cell in cells(spec))
        assert running.run(spec, store, no_flower).failed == 0
        assert table_of(store.path) == table_of(tmp_path / "whole")


def test_three_at_once_make_each_cell_once(tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WAIT_SECONDS", 0.01)
    spec, store = tiny(tmp_path)
    with ThreadPoolExecutor(3) as pool:
        tallies = list(pool.map(lambda _: running.run(spec, store, no_flower), range(3)))
    assert len(slow.made) == len(set(slow.made)) == 12
    assert [(tally.done, tally.failed) for tally in tallies] == [(12, 0)] * 3


def test_what_failed_in_another_process_meanwhile_is_not_tried_again(tmp_path: Path, slow: Slow) -> None:
    def other_fails(cell: Cell) -> None:
        if cell.key == first.key:
            store.note_failure(later, "elsewhere")
            os.utime(store.error_path(later), (time.time() + 5, time.time() + 5))

    (spec, store), slow.before = tiny(tmp_path), other_fails
    first, later, *_ = cells(spec)
    tally = running.run(spec, store, no_flower)
    assert (tally.done, tally.failed, len(slow.made)) == (12, 1, 11)


def test_other_code_makes_other_cells(tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is said to be the same."""
    spec, store = tiny(tmp_path)
    with patch.object(storing, "read_result", wraps=storing.read_result) as looked:
        running.run(spec, store, no_flower)
    assert looked.call_count == 3 * 12  # for the estimate, before the lock and behind it, however long the grid is
    monkeypatch.setattr(storing, "core", lambda: "0123456789ab")
    running.run(spec, replace(store, any_code=True), no_flower)
    assert len(slow.made) == 12
    running.run(spec, store, no_flower)
    assert len(slow.made) == len(set(slow.made)) == 24


def test_only_results_are_kept_where_the_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings: unknown config key 'keep'"):  # it belongs to the table above it
        read(a_bench(tmp_path, f'keep = "results"\n{GRID}'))
    spec, store = read(a_bench(tmp_path, ONE_PLACE, 'keep = "results"\n')), Store(tmp_path / "out")
    running.run(spec, store, no_flower)
    place = store.place(cells(spec)[2])
    assert (place / "result.json").exists()
    assert (place / "images.png").exists()
    assert not list(place.glob("*.safetensors"))
    assert len(list((place.parents[1] / "uploads").glob("client_*"))) == 3


FLOWER = '[grid]\nmethods = ["flower:fedadam"]\nrounds = [1, 3]\nclients = [3]\n'
TUNED = FLOWER + '[tune]\n[tune.methods."flower:fedadam"]\nflower.options = ["eta=0.01", "eta=0.1", "eta=1.0"]\n'


class Federation:
    """A stand-in of Flower's app: the accuracy is given by eta (None: the strategy's own); too large a one fails."""

    def __init__(self, accuracy: dict[float | None, float]) -> None:
        self.accuracy, self.ran = accuracy, list[Config]()

    def __call__(self, config: Config, scratch: Path) -> Path:
        self.ran.append(config)
        (scratch / "flower.log").write_text("said\n")
        eta = config.flower.strategy_options().get("eta")
        if eta not in self.accuracy:
            raise RunError("Flower: it diverged")
        folder = RunFolder.create(replace(config, out_dir=str(scratch)), "fedadam-1")
        value = self.accuracy[eta]
        folder.write_result(build(config=folder.config, device="cpu", bytes_up=[8] * 3, seconds={}, student=value))
        return folder.path


def test_a_cell_of_flower_s_is_brought_to_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec, store), flower = tiny(tmp_path, FLOWER), Federation({None: 40.0})
    for _ in range(2):  # the second time it is there
        assert running.run(spec, store, flower).failed == 0
        assert [(each.flower.strategy, each.flower.rounds) for each in flower.ran] == [("fedadam", 1), ("fedadam", 3)]
    assert [(store.place(cell) / "flower.log").read_text() for cell in cells(spec)] == ["said\n"] * 2
    assert not list(tmp_path.glob("out/flower/*/.*"))
    monkeypatch.setattr(running, "changed", lambda: True)  # what ran with other code is no result
    other = Store(tmp_path / "other")
    assert running.run(spec, other, flower).failed == 2
    assert all(other.result(cell) is None for cell in cells(spec))
    assert "the code has changed since this bench began; start it again" in other.error_path(cells(spec)[0]).read_text()


def test_settings_are_chosen_on_validation_images_and_all_that_was_tried_is_told(tmp_path: Path) -> None:
    (spec, store), flower = tiny(tmp_path, TUNED), Federation({0.01: 40.0, 0.1: 60.0})
    tally = running.run(spec, store, flower)
    assert (tally.total, tally.failed) == (2 * 3 + 2, 2)  # 1.0 diverges at both numbers of rounds
    tuning, final = flower.ran[:6], flower.ran[6:]
    assert {(each.seed, each.data.validation) for each in tuning} == {(100, 0.2)}
    assert [(each.seed, each.data.validation, each.flower.options) for each in final] == [(0, 0.0, "eta=0.1")] * 2
    command.write(store.path, store.path)
    (one, other) = load(store.path).entries
    tried = [{"flower.options": "eta=0.01", "accuracy": 40.0}, {"flower.options": "eta=0.1", "accuracy": 60.0}]
    assert one["bench"]["tuned"]["tried"] == [*tried, {"flower.options": "eta=1.0", "accuracy": None}]
    assert one["bench"]["tuned"]["chosen"] == other["bench"]["tuned"]["chosen"] == {"flower.options": "eta=0.1"}
    text = (store.path / "table.md").read_text()
    assert "flower.options = eta=0.01 (40.0), flower.options = eta=0.1 (60.0), flower.options = eta=1.0 (fai" in text
    equals = Federation(dict.fromkeys((0.01, 0.1, 1.0), 50.0))
    running.run(spec, Store(tmp_path / "equals"), equals)
    assert {each.flower.options for each in equals.ran[6:]} == {"eta=0.01"}  # the first


def test_results_that_are_known_are_not_made_again_and_the_table_is_the_same(tmp_path: Path, made: Made) -> None:
    path = a_bench(tmp_path, TUNED.replace('methods = ["', 'methods = ["fedavg", "'))
    flower = Federation({0.01: 40.0, 0.1: 60.0, 1.0: 20.0})
    before, after, more, other = (Store(tmp_path / str(number)) for number in range(4))
    running.run(read(path), before, flower)
    command.write(before.path, before.path)
    assert (len(flower.ran), made()[1]) == (8, 1)
    known = load(before.path / "results.jsonl")
    assert running.run(read(path), after, flower, known).failed == 0
    command.write(after.path, after.path)
    assert (len(flower.ran), made()[1]) == (8, 1)
    assert load(after.path) == known
    assert (after.path / "table.md").read_text() == (before.path / "table.md").read_text()
    # a cell that was taken over is a whole run: one can look at its page
    averaged = cells(read(path))[0]
    assert after.result(averaged)["config"]["data.path"] == ""
    assert write_page(after.place(averaged)).is_file()
    # another seed is made, by the choice that is known
    running.run(read(path, {"grid.seed": [0, 1]}), more, flower, known)
    assert [(each.seed, each.flower.options) for each in flower.ran[8:]] == [(1, "eta=0.1")] * 2
    assert made()[1] == 2
    # under other settings nothing is known, and the choice is made anew
    flower = Federation({0.01: 50.0, 0.1: 30.0, 1.0: 20.0})
    running.run(read(path, {"local.epochs": 2}), other, flower, known)
    assert made()[1] == 3
    assert [each.flower.options for each in flower.ran[6:]] == ["eta=0.01"] * 2


def test_results_of_an_older_version_are_known_by_today_s_names(tmp_path: Path) -> None:
    """The committed trial has the keys of its day: `strategy.*`, and one for each extra of an upload."""
    known = load(ROOT / "benchmarks" / "results" / "bench" / "smoke" / "results.jsonl")
    assert {"strategy.eta", "upload.statistics"} <= known.entries[0]["config"].keys()
    spec, store = read(ROOT / "configs" / "bench" / "smoke.toml"), Store(tmp_path)
    choices = chosen_in(known, tune_cells(spec))
    assert choices["digits", "flower:fedadam", 1]["chosen"] == {"flower.options": "eta=0.1"}
    grid = cells(spec, choices)
    adopt(known, grid, store)
    assert {"fedavg", "lda", "flower:fedadam"} <= {cell.label for cell in grid if store.result(cell)}


def test_the_reason_of_flower_s_failure_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "simulate.py"
    script.write_text("import sys; print('fedmitr: error: too few nodes', file=sys.stderr); sys.exit(1)")
    monkeypatch.setattr(real_flower, "COMMAND", (sys.executable, str(script)))
    (cell, _) = cells(read(a_bench(tmp_path, FLOWER)))
    with pytest.raises(RunError, match=r"^Flower: too few nodes \(its log, until the next try: .*flower\.log\)$"):
        real_flower.runner()(cell.config, tmp_path)
    script.write_text("import sys; print('fedmitr: run folder: /there/' + sys.argv[-3] + sys.argv[-1])")
    assert real_flower.runner(0.5)(cell.config, tmp_path) == Path("/there/30.5")


def start(bench: Path, out: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "fedmitr_flwr", "bench", str(bench), "--out", str(out)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_job_in_the_background_can_be_stopped(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does; the process inherits it
    try:
        jobs = {number: start(a_bench(tmp_path), tmp_path / number.name) for number in (signal.SIGINT, signal.SIGTERM)}
    finally:
        signal.signal(signal.SIGINT, before)
    for number, process in jobs.items():
        assert "bench folder" in process.stderr.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert said.endswith("fedmitr: interrupted; the same command goes on where it was\n")


@pytest.mark.slow
def test_two_processes_and_one_that_is_killed_give_the_table_of_an_undisturbed_run(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, GRID.replace('"lda", ', ""))
    killed = start(bench, tmp_path / "shared")
    while "[2/8]" not in killed.stderr.readline():
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    pair = [start(bench, tmp_path / "shared") for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    made = [re.findall(r"\] (.*): [\d.]+ % in ", text) for text in said]
    assert not set(made[0]) & set(made[1])
    assert 4 <= len(made[0]) + len(made[1]) <= 6  # the killed one had made two at least, four at most
    running.run(read(bench), Store(tmp_path / "whole"), no_flower)
    assert table_of(tmp_path / "shared") == table_of(tmp_path / "whole")


@pytest.mark.slow
def test_flower_s_own_strategies_stand_beside_the_methods(tmp_path: Path) -> None:
    spec, store = tiny(tmp_path, '[grid]\nclients = [2]\nmethods = ["fedavg", "flower:fedavg"]')
    assert running.run(spec, store, real_flower.runner()).failed == 0
    ours, theirs = load(store.path).entries
    assert ours["accuracy"]["student"] == pytest.approx(theirs["accuracy"]["student"], abs=2.6)  # one image of 40
    for key in ("bytes_up", "partition_sha256", "counts", "evaluated_on"):
        assert ours[key] == theirs[key]

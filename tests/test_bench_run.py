"""Running a grid: shared uploads, what is skipped, what fails, who may work beside whom, and starting again."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedmitr_flwr import cli, pipeline
from fedmitr_flwr.bench import command
from fedmitr_flwr.bench import run as running
from fedmitr_flwr.bench import store as storing
from fedmitr_flwr.bench.command import write
from fedmitr_flwr.bench.grid import Cell, cells, tune_cells
from fedmitr_flwr.bench.known import adopt, chosen_in
from fedmitr_flwr.bench.results import load
from fedmitr_flwr.bench.spec import Bench, read
from fedmitr_flwr.bench.store import Store
from fedmitr_flwr.common.errors import ConfigError, RunError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.result import build
from fedmitr_flwr.uploads.upload import size

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else."""
    monkeypatch.setattr(pipeline, "save_images", lambda *given: given[-1].write_bytes(b"picture"))
    monkeypatch.setattr(command, "draw", lambda *_: 0)


SMALL = """
[settings]
device = "cpu"
threads = 1
data.train-limit = 120
data.test-limit = 40
model.width = 16
model.depth = 1
model.patch-size = 4
local.epochs = 1
inversion.steps = 4
distill.rounds = 2
distill.images-per-round = 10
distill.epochs-per-round = 1
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """`fedmitr bench` sets levels and signal handlers for its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [logging.getLogger(name) for name in ("fedmitr", "fedmitr.bench")]
    levels = [logger.level for logger in loggers]
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def a_bench(folder: Path, grid: str, top: str = "") -> Path:
    path = folder / "tiny.toml"
    path.write_text(top + SMALL + grid)
    return path


def tiny(folder: Path, grid: str) -> tuple[Bench, Store]:
    return read(a_bench(folder, grid)), Store(folder / "out")


def no_flower(config: Config, scratch: Path) -> Path:
    raise AssertionError(f"Flower was called in {scratch} for {config}")


def told(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in log.records if record.name == "fedmitr.bench"]


class Made:
    """Counts what is really made."""

    def __init__(self) -> None:
        self.uploads, self.fused = 0, list[str]()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    counts, train, fuse = Made(), pipeline.train_client, pipeline.fuse

    def spy_train(*args: Any, **kwargs: Any) -> Any:
        counts.uploads += 1
        return train(*args, **kwargs)

    def spy_fuse(run: RunFolder, method: str, *rest: Any) -> Any:
        counts.fused.append(method)
        return fuse(run, method, *rest)

    monkeypatch.setattr(pipeline, "train_client", spy_train)
    monkeypatch.setattr(pipeline, "fuse", spy_fuse)
    return counts


GRID = '[grid]\npartition = ["dirichlet", "iid"]\nclients = [3]\nmethods = ["fedavg", "lda", "fedmitr"]\nseed = [0, 1]'


def test_uploads_are_made_once_and_finished_cells_are_skipped(
    tmp_path: Path, made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmitr.bench")
    spec, store = tiny(tmp_path, GRID)
    tally = running.run(spec, store, no_flower)
    assert (tally.total, tally.done, tally.failed) == (12, 12, 0)
    assert made.uploads == 2 * 2 * 3  # seeds, partitions, clients
    assert len(made.fused) == 12
    results = [store.result(cell) for cell in cells(spec)]
    assert len({result["partition_sha256"] for result in results if result}) == 4
    last = r"\[12/12\] digits, IID, K 3, seed 1, fedmitr: \d+\.\d\d % in 0:\d\d; the last one"
    assert re.search(last, told(caplog)[-1])
    assert re.search(r"\[1/12\] .*; about \d+:\d\d left", told(caplog)[0])

    caplog.clear()
    assert running.run(spec, store, no_flower).failed == 0
    assert (made.uploads, len(made.fused)) == (12, 12)
    assert all("finished before" in line for line in told(caplog))


def test_a_grid_of_which_a_part_was_started_meanwhile_has_a_table_of_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = read(a_bench(tmp_path, GRID.replace('"lda", "fedmitr"', '"fedmedian"'))), tmp_path / "out"
    part, make = replace(spec, seeds=(1,)), running.make

    def beside(cell: Cell, *rest: Any, **named: Any) -> Any:
        if (cell.seed, cell.label) == (0, "fedmedian"):
            monkeypatch.setattr(running, "make", make)
            assert running.run(part, Store(out), no_flower).total == 4
            assert len(load(out).entries) == 4
        return make(cell, *rest, **named)

    monkeypatch.setattr(running, "make", beside)
    assert running.run(spec, Store(out), no_flower).total == 8
    assert len(load(out).entries) == 8
    assert not load(out).missing


def test_a_cell_is_what_one_run_alone_would_be(tmp_path: Path) -> None:
    """More is uploaded than this method asks for, and neither weights nor counted bytes show it."""
    spec, store = tiny(tmp_path, GRID)
    running.run(replace(spec, seeds=(0,)), store, no_flower)
    place = {cell.label: store.place(cell) for cell in cells(spec) if cell.skew.scheme == "iid" and cell.seed == 0}
    config = Config.from_file(place["fedmitr"] / "config.toml")
    alone = pipeline.run(replace(config, out_dir=str(tmp_path / "alone")), "alone")
    for name in ("model.safetensors", "pool.safetensors"):
        assert (place["fedmitr"] / name).read_bytes() == (alone.path / name).read_bytes()
    ours, theirs = RunFolder.open(place["fedmitr"]).read_result(), alone.read_result()
    for key in ("accuracy", "bytes_up", "confusion", "partition_sha256", "counts"):
        assert ours[key] == theirs[key], key
    lda = RunFolder.open(place["lda"]).read_result()
    assert lda["bytes_statistics"][0] == lda["bytes_up"][0] - ours["bytes_up"][0] > 0
    whole = load_tensors(place["fedmitr"].parents[1] / "uploads" / "client_000.safetensors")[0]
    assert size(whole) > lda["bytes_up"][0]  # the variances are there for fedpft


BAD = GRID.replace('"lda"', '"bad"') + '\n[methods.bad]\nmethod = "fedmitr"\n'
BAD += "distill.lr = 1e30"  # whose student diverges


@pytest.mark.usefixtures("capsys")
def test_a_failed_cell_is_noted_and_the_grid_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    words = ["bench", str(a_bench(tmp_path, BAD)), "--out", str(out), "grid.seed=[0]"]
    assert cli.main(words) == 1
    assert len(load(out).entries) == 4
    assert [place["label"] for place in load(out).missing] == ["bad", "bad"]
    notes = sorted((out / "failed").iterdir())
    assert len(notes) == 2
    text = notes[0].read_text()
    assert text.startswith("digits, Dirichlet 0.3, K 3, seed 0, bad\nRunError: ")
    assert "the student diverged" in text.splitlines()[1]
    assert "distill.lr = 1e+30" in text
    assert "Traceback" not in text  # bad input is one line
    assert "Cells without a result: 2 (`bad` 2)." in (out / "table.md").read_text()

    slow = Slow()
    monkeypatch.setattr(running, "make", slow)  # as if it did not diverge now
    assert cli.main(words) == 0
    assert len(slow.made) == 2  # only what had failed
    assert list((out / "failed").iterdir()) == []
    assert len(load(out).entries) == 6


def test_a_bug_is_noted_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train_client", Mock(side_effect=ZeroDivisionError("by hand")))
    spec, store = tiny(tmp_path, GRID)
    assert running.run(replace(spec, seeds=(0,)), store, no_flower).failed == 6
    text = next((tmp_path / "out" / "failed").iterdir()).read_text()
    assert "ZeroDivisionError: by hand" in text.splitlines()[1]
    assert "Traceback" in text


def table_of(out: Path) -> list[list[str]]:
    """The table without what a clock or a memory gauge tells."""
    write(out, out)
    head, *lines = [line.split(",") for line in (out / "table.csv").read_text().splitlines()]
    timeless = [place for place, name in enumerate(head) if "seconds" not in name and "peak" not in name]
    return [[line[place] for place in timeless] for line in lines]


@pytest.mark.parametrize("where", ["train_local", "images", "evaluate", "write_result"])
def test_stopped_anywhere_and_started_again_gives_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from fedmitr_flwr import judge
    from fedmitr_flwr.methods.rounds import Rounds

    spec = read(a_bench(tmp_path, GRID.replace("[0, 1]", "[0]")))
    running.run(spec, Store(tmp_path / "whole"), no_flower)
    module: Any = {"train_local": pipeline, "images": Rounds, "evaluate": judge, "write_result": RunFolder}[where]
    real, calls = getattr(module, where), 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, where, stops)
    store = Store(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        running.run(spec, store, no_flower)
    assert not all(store.result(cell) for cell in cells(spec))
    assert running.run(spec, store, no_flower).failed == 0
    assert table_of(tmp_path / "stopped") == table_of(tmp_path / "whole")


class Slow:
    """A stand-in of `run.make` that takes a moment and notes who was at work at the same time."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.at_work: set[str] = set()

    def __call__(self, cell: Cell, store: Store, *_: Any, **__: Any) -> dict[str, Any]:
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


def test_three_at_once_make_each_cell_once(tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WAIT_SECONDS", 0.01)
    spec, store = tiny(tmp_path, GRID)
    with ThreadPoolExecutor(3) as pool:
        tallies = list(pool.map(lambda _: running.run(spec, store, no_flower), range(3)))
    assert len(slow.made) == len(set(slow.made)) == 12
    assert [(tally.done, tally.failed) for tally in tallies] == [(12, 0)] * 3


def test_who_waits_sees_what_the_other_could_not_make(
    tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that failed in another process since we began is not tried again by us."""
    spec, store = tiny(tmp_path, GRID)
    first, later, *_ = cells(spec)

    def other_fails(cell: Cell, *rest: Any, **more: Any) -> dict[str, Any]:
        if cell.key == first.key:
            store.note_failure(later, "elsewhere")
            os.utime(store.error_path(later), (time.time() + 5, time.time() + 5))
        return slow(cell, *rest, **more)

    monkeypatch.setattr(running, "make", other_fails)
    tally = running.run(spec, store, no_flower)
    assert (tally.done, tally.failed, len(slow.made)) == (12, 1, 11)


def test_the_time_that_is_left_by_hand(tmp_path: Path) -> None:
    spec, store = tiny(tmp_path, GRID)
    loop = running._Loop(spec, store, no_flower, running.Tally(12))
    loop.spent = {"fedavg": [1.0, 3.0], "fedmitr": [14.0]}
    after = [cell for cell in cells(spec) if cell.seed == 0]
    # twice each of fedavg (2 s on average), fedmitr (14 s) and lda (not known: 18 / 3 = 6 s)
    loop.run([], after)
    assert loop._left() == "about 0:44 left"
    Slow()(after[0], store)
    loop.run([], after)
    assert loop._left() == "about 0:42 left"
    loop.run([])
    assert loop._left() == "the last one"


@pytest.mark.usefixtures("slow")
def test_a_grid_looks_up_each_result_a_few_times_however_long_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Mock(side_effect=storing.read_result)
    monkeypatch.setattr(storing, "read_result", looked)
    for seeds in (2, 4):
        looked.reset_mock()
        words = {"grid.seed": list(range(seeds))}
        running.run(read(a_bench(tmp_path, GRID), words), Store(tmp_path / str(seeds)), no_flower)
        assert looked.call_count == 3 * 6 * seeds  # for the estimate, before the lock and behind it


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    hold = "import sys, time; from filelock import FileLock\nlock = FileLock(sys.argv[1]); lock.acquire()\n"
    hold += "print('held', flush=True); time.sleep(60)"
    store = Store(tmp_path)
    with store.claim("cell") as mine:
        assert mine
        with store.claim("cell") as again:
            assert not again
    command = [sys.executable, "-c", hold, str(tmp_path / ".locks" / "cell.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with store.claim("cell") as mine:
            assert not mine
        holder.kill()
        holder.wait()
    with store.claim("cell") as mine:
        assert mine


def test_other_code_makes_other_cells_unless_it_is_said_to_be_the_same(
    tmp_path: Path, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store = tiny(tmp_path, GRID)
    running.run(spec, store, no_flower)
    monkeypatch.setattr(storing, "core", lambda: "0123456789ab")
    running.run(spec, replace(store, any_code=True), no_flower)
    assert len(slow.made) == 12
    running.run(spec, store, no_flower)
    assert len(slow.made) == len(set(slow.made)) == 24


def test_only_results_are_kept_where_the_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings: unknown config key 'keep'"):  # it belongs to the table above it
        read(a_bench(tmp_path, f'keep = "results"\n{GRID}'))
    spec, store = read(a_bench(tmp_path, GRID, 'keep = "results"\n')), Store(tmp_path / "out")
    running.run(replace(spec, seeds=(0,)), store, no_flower)
    place = store.place(cells(spec)[2])
    assert (place / "result.json").exists()
    assert (place / "images.png").exists()
    assert not list(place.glob("*.safetensors"))
    assert len(list((place.parents[1] / "uploads").glob("client_*"))) == 3


# --- Flower's own strategies ---

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
    for cell in cells(spec):
        assert (store.place(cell) / "flower.log").read_text() == "said\n"
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
    write(store.path, store.path)
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
    grid = TUNED.replace('methods = ["', 'methods = ["fedavg", "')
    path, flower = a_bench(tmp_path, grid), Federation({0.01: 40.0, 0.1: 60.0, 1.0: 20.0})
    before = Store(tmp_path / "before")
    running.run(read(path), before, flower)
    write(before.path, before.path)
    ran, fused = len(flower.ran), len(made.fused)
    assert (ran, fused) == (8, 1)

    known = load(before.path / "results.jsonl")
    after = Store(tmp_path / "after")
    assert running.run(read(path), after, flower, known).failed == 0
    write(after.path, after.path)
    assert (len(flower.ran), len(made.fused)) == (ran, fused)
    assert load(after.path) == known
    assert (after.path / "table.md").read_text() == (before.path / "table.md").read_text()

    # a cell that was taken over is a whole run: one can look at its page
    averaged = cells(read(path))[0]
    assert (after.result(averaged) or {})["config"]["data.path"] == ""
    assert write_page(after.place(averaged)).is_file()

    # another seed is made, by the choice that is known
    more = Store(tmp_path / "more")
    running.run(read(path, {"grid.seed": [0, 1]}), more, flower, known)
    assert [(each.seed, each.flower.options) for each in flower.ran[ran:]] == [(1, "eta=0.1")] * 2
    assert len(made.fused) == fused + 1

    # under other settings nothing is known, and the choice is made anew
    other, flower = Store(tmp_path / "other"), Federation({0.01: 50.0, 0.1: 30.0, 1.0: 20.0})
    running.run(read(path, {"local.epochs": 2}), other, flower, known)
    assert len(made.fused) == fused + 2
    assert len(flower.ran) == 8
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
    from fedmitr_flwr.bench import flower

    script = tmp_path / "flower_run.py"
    script.write_text("import sys; print('flower_run: error: too few nodes', file=sys.stderr); sys.exit(1)")
    monkeypatch.setattr(flower, "SCRIPT", script)
    (cell, _) = cells(read(a_bench(tmp_path, FLOWER)))
    with pytest.raises(RunError, match=r"^Flower: too few nodes \(its log, until the next try: .*flower\.log\)$"):
        flower.runner()(cell.config, tmp_path)
    script.write_text("import sys; print('flower_run: run folder: /there/' + sys.argv[-3] + sys.argv[-1])")
    assert flower.runner(0.5)(cell.config, tmp_path) == Path("/there/30.5")
    script.unlink()
    with pytest.raises(RunError, match="need a checkout"):
        flower.runner()(cell.config, tmp_path)


# --- whole processes ---


def start(bench: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fedmitr_flwr", "bench", str(bench), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_in_the_background_can_be_stopped(tmp_path: Path, number: int) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does; the process inherits it
    try:
        process = start(a_bench(tmp_path, GRID), tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert "bench folder" in process.stderr.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("fedmitr: interrupted; the same command goes on where it was\n")


@pytest.mark.slow
def test_two_processes_and_one_that_is_killed_give_the_table_of_an_undisturbed_run(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, GRID)
    with start(bench, tmp_path / "whole") as undisturbed:
        said = undisturbed.communicate(timeout=300)[1]
    assert undisturbed.returncode == 0, said

    killed = start(bench, tmp_path / "shared")
    assert killed.stderr is not None
    while "[2/12]" not in killed.stderr.readline():
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stderr.close()
    pair = [start(bench, tmp_path / "shared") for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    made = [re.findall(r"\] (.*): [\d.]+ % in ", text) for text in said]
    assert not set(made[0]) & set(made[1])
    assert 8 <= len(made[0]) + len(made[1]) <= 10  # the killed one had made two at least, four at most
    assert table_of(tmp_path / "shared") == table_of(tmp_path / "whole")


@pytest.mark.slow
def test_flower_s_own_strategies_stand_beside_the_methods(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, '[grid]\nclients = [2]\nmethods = ["fedavg", "flower:fedavg"]')
    with start(bench, tmp_path / "out") as process:
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    ours, theirs = load(tmp_path / "out").entries
    assert ours["accuracy"]["student"] == pytest.approx(theirs["accuracy"]["student"], abs=2.6)  # one image of 40
    for key in ("bytes_up", "partition_sha256", "counts", "evaluated_on"):
        assert ours[key] == theirs[key]

"""Run a grid: what is finished is skipped, what fails is noted, and other processes may work on the same folder."""

import gc
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from .. import pipeline
from ..central import train_centrally
from ..common.compute import threads
from ..common.errors import RunError, UserError, printable
from ..common.files import write_text
from ..common.fingerprint import changed, core
from ..common.progress import clock
from ..config import Config
from ..judge import Lines
from ..judge import lines as lines_of
from ..runs.folder import RunFolder
from .flower import Runner
from .grid import ALL_EXTRAS, Cell, cells, tune_cells
from .known import adopt, chosen_in
from .results import Results
from .spec import Bench
from .store import Store
from .tune import choose

log = logging.getLogger("fedmitr.bench")

WAIT_SECONDS = 1.0  # between two looks at what other processes are doing


class Busy(Exception):
    """Somebody else makes the uploads that a cell needs."""


@dataclass
class Tally:
    """How far a grid is."""

    total: int
    done: int = 0
    failed: int = 0


def run(bench: Bench, store: Store, flower: Runner, known: Results | None = None) -> Tally:
    """Run all cells that are not finished, first those that settings are chosen by.

    Those of an earlier bench, whose results are `known`, are not run again. In what is given back, tuning runs count.
    """
    trials = tune_cells(bench)
    choices = dict(chosen_in(known, trials)) if known else {}
    trials = {place: tried for place, tried in trials.items() if place not in choices}
    about = {"name": bench.name, "reference": bench.reference, "core": core()}
    first = [cell for tried in trials.values() for _, cell in tried]
    untuned = cells(bench, choices)
    store.write_manifest(about, [*first, *untuned])
    loop = _Loop(bench, store, flower, Tally(len(first) + len(untuned)))
    if first:
        loop.run(first, untuned)
    grid = cells(bench, {**choices, **choose(trials, store)}) if trials else untuned
    if known:
        adopt(known, grid, store)
    store.write_manifest(about, [*first, *grid])
    loop.run(grid)
    # Another grid may have been noted in the folder meanwhile: the tables that follow are of this one.
    store.write_manifest(about, [*first, *grid])
    return loop.tally


class _Loop:
    def __init__(self, bench: Bench, store: Store, flower: Runner, tally: Tally) -> None:
        self.bench, self.store, self.flower, self.tally = bench, store, flower, tally
        self.spent: dict[str, list[float]] = {}  # seconds of finished cells by label
        self.unknown: dict[str, str] = {}  # labels of cells without a result, for the estimate
        self.started = time.time()

    def run(self, wanted: Sequence[Cell], later: Sequence[Cell] = ()) -> None:
        """Make what is `wanted`; what comes `later` is only counted in the estimate of what is left."""
        self.unknown = {cell.key: cell.label for cell in (*wanted, *later) if self.store.result(cell) is None}
        todo = list(wanted)
        while todo:
            left = [cell for cell in todo if not self._settle(cell)]
            if len(left) == len(todo):
                time.sleep(WAIT_SECONDS)
            todo = left

    def _settle(self, cell: Cell) -> bool:
        """Make a cell, unless it is there; False: somebody else is at it."""
        if self._known(cell):
            return True
        with self.store.claim(cell.key) as mine:
            if not mine:
                return False
            if self._known(cell):  # meanwhile
                return True
            started = time.perf_counter()
            try:
                result = make(cell, self.store, self.flower, keep=self.bench.keep)
            except Busy:
                return False
            except Exception as error:
                self._fail(cell, error)
                return True
        self.spent.setdefault(cell.label, []).append(time.perf_counter() - started)
        self.store.forget_failure(cell)
        self.unknown.pop(cell.key, None)
        accuracy, spent = result["accuracy"]["student"], clock(self.spent[cell.label][-1])
        self._tell(cell, f"{accuracy:.2f} % in {spent}; {self._left()}")
        return True

    def _known(self, cell: Cell) -> bool:
        """Whether the cell is finished, or another process has tried it since we began."""
        result = self.store.result(cell)
        if result is not None:
            self.spent.setdefault(cell.label, []).append(sum(result["seconds"].values()))
            self.store.forget_failure(cell)
            self._tell(cell, f"{result['accuracy']['student']:.2f} %, finished before")
            return True
        path = self.store.error_path(cell)
        if path.exists() and path.stat().st_mtime > self.started:
            self.tally.failed += 1
            self._tell(cell, f"failed in another process ({path})")
            return True
        return False

    def _fail(self, cell: Cell, error: Exception) -> None:
        said = printable(" ".join(str(error).split())) or type(error).__name__
        trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        self.store.note_failure(
            cell, f"{cell.name}\n{type(error).__name__}: {said}\n\n{trace}\nIts settings:\n{cell.config.to_toml()}"
        )
        self.tally.failed += 1
        self._tell(cell, f"FAILED: {said[:300]} ({self.store.error_path(cell)})")
        gc.collect()  # its traceback may have held a device's memory

    def _tell(self, cell: Cell, what: str) -> None:
        self.tally.done += 1
        self.unknown.pop(cell.key, None)
        log.info("[%d/%d] %s: %s", self.tally.done, self.tally.total, cell.name, what)

    def _left(self) -> str:
        """An estimate: what cells of the same label took; of unknown labels, what cells took on average."""
        every = mean(spent for label in self.spent.values() for spent in label)
        seconds = sum(mean(self.spent.get(label) or [every]) for label in self.unknown.values())
        return f"about {clock(seconds)} left" if self.unknown else "the last one"


def make(cell: Cell, store: Store, flower: Runner, keep: str = "all") -> dict[str, Any]:
    """Make one cell; its lock is held. Returns its result.

    Raises:
        Busy: somebody else makes its uploads.
    """
    folder = _by_flower(cell, store, flower) if cell.variant.flower else _fuse(cell, store)
    if keep == "results":
        for path in (folder.model_path, folder.model_config_path, folder.card_path, folder.pool_path):
            path.unlink(missing_ok=True)
    return folder.read_result()


def _fuse(cell: Cell, store: Store) -> RunFolder:
    with store.claim(cell.group) as mine:
        if not mine:
            raise Busy
        uploads = _uploads(cell, store)
        lines = _lines(uploads)
    if not cell.variant.is_method:
        return train_centrally(uploads, uploads.begun(store.place(cell).name, cell.config))
    own = {key: value for key, value in cell.config.to_flat().items() if key not in ("out-dir", "resume-from")}
    return pipeline.fuse(uploads, cell.variant.method, own, store.place(cell).name, lines)


def _uploads(cell: Cell, store: Store) -> RunFolder:
    """The run folder of a cell's uploads; those that are missing are made. Clients tell all that a method may ask."""
    folder = _group(store.uploads(cell), cell.config)
    missing = folder.missing()
    initial = pipeline.start_of(cell.config) if missing else {}
    for client in missing:
        pipeline.take_upload(folder, client, initial)
    return folder


def _lines(uploads: RunFolder) -> Lines:
    """What the uploads are alone and on average, evaluated once for all methods; a damaged file is made anew."""
    path = uploads.path / "lines.json"
    with suppress(OSError, ValueError):
        known: Lines = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and {"fedavg", "local"} <= known.keys():
            return known
    with threads(uploads.config.threads):
        found = lines_of(uploads.load_uploads(), uploads.config)
    write_text(path, json.dumps(found) + "\n")
    return found


def _group(path: Path, config: Config) -> RunFolder:
    if (path / "config.toml").is_file():
        return RunFolder.open(path)
    asked = Config.from_flat({**ALL_EXTRAS, "method": "fedavg"}, base=config)
    folder = RunFolder(path, replace(asked, out_dir=str(path.parent)))
    folder.refused_path.mkdir(parents=True, exist_ok=True)
    folder.continue_with(folder.config)
    return folder


def _by_flower(cell: Cell, store: Store, flower: Runner) -> RunFolder:
    place = store.place(cell)
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in (place, *place.parent.glob(f".{place.name}.*")):  # of a start that was killed; no result is in it
        shutil.rmtree(left, ignore_errors=True)
    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    scratch.mkdir()
    made = flower(cell.config, scratch)
    if changed():  # it ran in processes of its own, with the code as it was then
        raise RunError("the code has changed since this bench began; start it again")
    made.replace(place)
    (scratch / "flower.log").replace(place / "flower.log")
    shutil.rmtree(scratch, ignore_errors=True)
    return RunFolder.open(place)

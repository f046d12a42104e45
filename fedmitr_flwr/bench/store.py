"""The folder of a bench: where each cell lies, which are finished, who works on which, and what went wrong.

    bench.json             the cells of the grid that was run last, and where each one lies
    uploads/<group>/       a run folder: the uploads that its cells share; <group> names settings and code
      fused/<cell>/        a one-shot cell
    flower/<group>/<cell>/ a cell of one of Flower's strategies
    failed/<cell>.txt      what went wrong, until the cell has been made
    .locks/                one file for each cell or group that somebody has worked on

A folder's name ends in hashes of the settings and of the code that can change a number: of uploads
`fingerprint.core`, of a cell also its method's file. Under other settings or code a cell is another cell, and nothing
is overwritten; a new method leaves all others as they are. Locks are the operating system's: they end
with the process that holds them, however it ends.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from ..common.errors import RunError
from ..common.files import read_text, write_text
from ..common.fingerprint import core, of_flower, of_method
from ..runs.result import unsealed
from .grid import Cell

MANIFEST = "bench.json"


@dataclass(frozen=True)
class Store:
    """One bench on disk."""

    path: Path  # the folder
    any_code: bool = False  # go on with what other versions of the code have made

    def uploads(self, cell: Cell) -> Path:
        """The run folder with the uploads of a one-shot cell."""
        return self._of_code(self.path / "uploads" / cell.group, core())

    def place(self, cell: Cell) -> Path:
        """The folder of the cell itself."""
        if cell.variant.flower:
            return self._of_code(self.path / "flower" / cell.group, of_flower()) / cell.folder
        return self._of_code(self.uploads(cell) / "fused" / cell.folder, of_method(cell.config.method))

    def _of_code(self, path: Path, code: str) -> Path:
        """The folder that `code` makes; with `any_code` the newest that any has made, if this one has not."""
        own = path.with_name(f"{path.name}.{code[:8]}")
        if self.any_code and not own.exists():
            others = sorted(path.parent.glob(f"{path.name}.*"), key=lambda path: path.stat().st_mtime)
            return others[-1] if others else own
        return own

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a finished cell; None: there is none, or none that can be read."""
        found = read_result(self.place(cell) / "result.json")
        if found is None or found["accuracy"]["student"] is None:
            return None
        return found if cell.is_of(found["config"]) else None

    def error_path(self, cell: Cell) -> Path:
        return self.path / "failed" / f"{cell.key}.txt"

    def note_failure(self, cell: Cell, text: str) -> None:
        self.error_path(cell).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.error_path(cell), text)

    def forget_failure(self, cell: Cell) -> None:
        self.error_path(cell).unlink(missing_ok=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold the lock of a cell or group while the block lasts; gives False if somebody else holds it."""
        lock = self._lock(name)
        with suppress(Timeout):
            lock.acquire(blocking=False)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def _lock(self, name: str) -> BaseFileLock:
        locks = self.path / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name}.lock")

    def write_manifest(self, about: Mapping[str, object], cells: Iterable[Cell]) -> None:
        """Note what the grid consists of, for the tables."""
        listed = [{**cell.facts, "folder": self.place(cell).relative_to(self.path).as_posix()} for cell in cells]
        with self._lock(MANIFEST):
            write_text(self.path / MANIFEST, json.dumps({**about, "cells": listed}, indent=1) + "\n")


def read_result(path: Path) -> dict[str, Any] | None:
    """A result.json; None where there is none, or a damaged one: such a cell is made again."""
    try:
        return unsealed(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError):
        return None


def read_manifest(path: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        RunError: the folder is not one of a bench.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not {"name", "reference", "cells"} <= manifest.keys() or not isinstance(manifest["cells"], list):
            raise ValueError("another kind of file")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is not a folder of `fedmitr bench` (no {MANIFEST}: {error}); name one") from error
    return manifest

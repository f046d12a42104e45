"""Images that no partition deals out: each client's own folder, and the server's test images.

Classes are matched by name. Each site numbers its classes as it likes and has its own part of them; the list of names
that the server sends with its order says which number each one has.
"""

import difflib
import logging
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..config import Config, DataConfig, ModelConfig
from ..errors import DataError
from ..limits import SEPARATOR
from .decode import Rows, Split, decode
from .images import Images
from .sources import FolderSplit, class_folders, data_folder, images_in, kept, open_split, split_folders
from .tables import TEST_NAMES, ParquetSplit, check_shards, find_files

log = logging.getLogger("fedmitr")


@dataclass(frozen=True)
class Place:
    """Where a client's own images lie, as its node was told; "" leaves a column's name to the server's settings."""

    path: str
    image_column: str = ""
    label_column: str = ""


def load_own(place: Place, config: Config) -> Images:
    """A client's training images, decoded once per process.

    Raises:
        DataError: they cannot be used. The text tells the server no more than it must know; names of columns, files
            and classes are in the log of the client.
    """
    return _load_own(place, config.data, config.model.in_chans, config.model.img_size, config.partition.min_size)


@lru_cache(maxsize=1)
def _load_own(place: Place, data: DataConfig, in_chans: int, img_size: int, least: int) -> Images:
    with _unsaid():
        split, rows, labels = _survey(place, data, least)
        pixels = decode(split, rows, in_chans, img_size)
    return Images(pixels, torch.from_numpy(labels))


def look_at_own(place: Place, config: Config) -> None:
    """Find out whether `load_own` could work, without decoding; says in the log which classes are there.

    Raises:
        DataError: as in `load_own`.
    """
    with _unsaid():
        _, _, labels = _survey(place, config.data, config.partition.min_size)
    names = config.data.class_names
    counts = np.bincount(labels, minlength=len(names))
    there = ", ".join(f"{name!r} {count}" for name, count in zip(names, counts, strict=True) if count)
    absent = ", ".join(repr(name) for name, count in zip(names, counts, strict=True) if not count)
    log.info("own images: %d of %d classes: %s", len(labels), int((counts > 0).sum()), there)
    log.info("classes without images here: %s", absent or "none")


class _ToldError(DataError):
    """An error whose text may leave the client."""


@contextmanager
def _unsaid() -> Iterator[None]:
    """Names of columns, files and classes are the client's own affair: they go to its log and not into the error."""
    try:
        yield
    except _ToldError:
        raise
    except DataError as error:
        log.error("%s", error)
        raise DataError("this client's images cannot be read; the client's own log says which, and why") from error


def _survey(place: Place, data: DataConfig, least: int) -> tuple[Split, Rows, Rows]:
    """The split, its rows of known classes (rising), and their labels as the server numbers them."""
    split = _open_own(place, data)
    labels = _renumbered(split, data, place.path)
    rows = np.flatnonzero(labels >= 0).astype(np.int64)
    if len(rows) < least:
        raise _ToldError(
            f"this client has {len(rows)} images, and partition.min-size = {least}; lower it, or leave it out"
        )
    return split, rows, labels[rows]


def _open_own(place: Place, data: DataConfig) -> Split:
    """Parquet files or class folders, whichever lie there; under train/, or right in the folder."""
    folder = Path(place.path).expanduser()
    if not folder.is_dir():
        log.error("data-path = %r: there is no folder %s", place.path, folder.absolute())
        raise _ToldError("this client's data-path is no folder; see --node-config of its SuperNode")
    files = _parquet_files(folder)
    classes = [path for path in _folders(folder) if any(images_in(path))]
    if files and classes:
        raise DataError(f"{folder} has Parquet files and folders of images; keep one of the two")
    if files:
        image = place.image_column or data.image_column
        chosen = replace(data, image_column=image, label_column=place.label_column or data.label_column)
        return ParquetSplit(chosen, files, named=True)
    if not classes:
        raise DataError(f"{folder} has neither *.parquet nor folders of images, <class>/<image files>")
    return FolderSplit(classes, tuple(path.name for path in classes))


def _parquet_files(folder: Path) -> list[Path]:
    """The train split where one is named so; otherwise all files but those of a test split."""
    for place in (folder, folder / "data"):
        files = sorted(place.glob("*.parquet"))
        train = [file for file in files if file.name.startswith("train")]
        if chosen := train or [file for file in files if not file.name.startswith(TEST_NAMES)]:
            check_shards(chosen)
            return chosen
    return []


def _folders(folder: Path) -> list[Path]:
    return class_folders(folder / "train" if (folder / "train").is_dir() else folder)


def _renumbered(split: Split, data: DataConfig, place: str) -> Rows:
    """(n,) the labels in the server's numbering, by name; -1 for images that are to be skipped.

    Raises:
        DataError: a class is unknown to the server, and data.unknown-classes = "refuse".
    """
    names = split.classes or tuple(map(str, range(int(split.labels.max(initial=-1)) + 1)))
    outside = (split.labels < 0) | (split.labels >= len(names))
    if outside.any():
        row = int(outside.argmax())
        raise DataError(f"{split.where(row)}: label {split.labels[row]} has no name; mend it or remove the row")
    known = {_same(name): number for number, name in enumerate(data.class_names)}
    to_server = np.array([known.get(_same(name), -1) for name in names], dtype=np.int64)
    labels: Rows = to_server[split.labels] if len(split.labels) else split.labels
    strange = [names[label] for label in np.unique(split.labels[labels < 0]).tolist()]
    if strange:
        _report_strange(strange, int((labels < 0).sum()), bool(split.classes), data, place)
    return labels


def _report_strange(strange: Sequence[str], images: int, named: bool, data: DataConfig, place: str) -> None:
    skip = data.unknown_classes == "skip"
    told = (
        f"{images} images of classes that the server does not know: {', '.join(_hint(each, data) for each in strange)}"
    )
    fix = "they are left out (data.unknown-classes = 'skip')" if skip else "rename them, or take them out"
    log.log(
        logging.WARNING if skip else logging.ERROR,
        "%s: %s; its classes: %s; %s",
        place,
        told,
        ", ".join(map(repr, data.class_names)),
        fix if named else "the labels here are numbers: store their names, as text or as Hugging Face's ClassLabel",
    )
    if not skip:
        raise _ToldError(
            f"{len(strange)} of this client's classes are unknown to the server (data.classes); the client's own log "
            "names them; rename them there, or set data.unknown-classes = 'skip'"
        )


def _hint(name: str, data: DataConfig) -> str:
    by_lower = {known.lower(): known for known in data.class_names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"{name!r} (like {by_lower[near[0]]!r}?)" if near else repr(name)


def _same(name: str) -> str:
    """File systems write one name in different ways: an accent may be a letter of its own."""
    return unicodedata.normalize("NFC", name.strip())


def named_classes(config: Config) -> Config:
    """The config with the names of all classes in data.classes: as set, or the server's data's, or plain numerals.

    Raises:
        DataError: the server's data has another number of classes, or a name that no setting can hold.
    """
    numerals = tuple(map(str, range(config.model.num_classes)))
    at_server = config.evaluate.where == "server"  # otherwise it has no images
    names = config.data.class_names or (at_server and _open_test(config.data).classes) or numerals
    if len(names) != len(numerals):
        raise DataError(
            f"{config.data.path}: the test images are of {len(names)} classes, but model.num-classes = "
            f"{len(numerals)}; make them equal, or name all classes in data.classes"
        )
    if bad := [name for name in names if SEPARATOR in name or name != name.strip()]:
        raise DataError(f"the class name {bad[0]!r} has a {SEPARATOR} or a blank at an end; rename the class")
    return replace(config, data=replace(config.data, classes=SEPARATOR.join(names)))


def load_own_test(data: DataConfig, model: ModelConfig) -> Images:
    """The server's test images, their classes found by name in `data.classes`."""
    return _load_own_test(data, model.in_chans, model.img_size)


@lru_cache(maxsize=1)
def _load_own_test(data: DataConfig, in_chans: int, img_size: int) -> Images:
    split = _open_test(data)
    labels = _renumbered(split, data, f"{data.path or data.source}, test split")
    rows = np.flatnonzero(labels >= 0)
    rows = rows[kept(len(rows), data.test_limit, "test")]
    return Images(decode(split, rows, in_chans, img_size), torch.from_numpy(labels[rows]))


def _open_test(data: DataConfig) -> Split:
    """Unlike the test split of a data set, it needs no train split beside it."""
    if data.source == "imagefolder":
        folders = split_folders(data_folder(data), TEST_NAMES)
        return FolderSplit(folders, tuple(path.name for path in folders))
    if data.source == "parquet":
        return ParquetSplit(data, find_files(data_folder(data), TEST_NAMES), named=True)
    return open_split(data, "test")

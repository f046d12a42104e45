"""Images that no partition deals out: each client's own folder, and the server's test images.

Classes are matched by name. Each site numbers its classes as it likes and has its own part of them; the list of names
that the server sends with its order says which number each one has.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..common.errors import ConfigError, DataError, say_once
from ..config import Config, DataConfig, ModelConfig
from ..config.limits import SEPARATOR
from .decode import Rows, Split, decode
from .images import Images
from .layout import (
    TEST_NAMES,
    TRAIN_NAMES,
    contents,
    folders_called,
    found_source,
    parquet_in,
    parquet_splits,
    same_name,
    subfolders,
)
from .sources import DigitsSplit, FolderSplit, kept, open_split
from .tables import ParquetTable, own_split

log = logging.getLogger("fedmitr")

MOST_NUMBERS = 10_000  # different ones in a label column, or as many as there are classes: more are no classes
SHOWN = 20  # names of unknown classes in one line


@dataclass(frozen=True)
class Place:
    """Where a client's own images lie, as its operator says; "" leaves a column's name to the server's settings."""

    path: str
    image_column: str = ""
    label_column: str = ""


def load_own(place: Place, config: Config) -> Images:
    """A client's training images, decoded once per process.

    Raises:
        DataError: they cannot be used. The text reveals no more to the server than it must know; names of columns,
            files and classes are in the log of the client.
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
    except (DataError, OSError) as error:
        fix = "; let the user that runs the SuperNode read all of data-path" if isinstance(error, OSError) else ""
        log.error("%s%s", error, fix)
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
    """Parquet files or class folders, whichever lie there; under train/, or right in the folder.

    Raises:
        DataError: there are neither, or both, or a class would be left out in silence.
        OSError: a folder cannot be listed.
    """
    folder = Path(place.path).expanduser().absolute()
    if not folder.is_dir():
        log.error("data-path = %r: there is no folder %s", place.path, folder)
        raise _ToldError("this client's data-path is no folder; see --node-config of its SuperNode")
    files = _parquet_files(folder)
    trains = folders_called(folder, TRAIN_NAMES)
    folders = subfolders(trains[0] if trains else folder)
    if files and any(contents(path).images for path in folders):
        raise DataError(f"{folder} has Parquet files and folders of images; keep one of the two")
    if files:
        image = place.image_column or data.image_column
        chosen = replace(data, image_column=image, label_column=place.label_column or data.label_column)
        return own_split(ParquetTable(files, folder), chosen)
    classes = [path for path in folders if _has_images(path)]
    if not classes:
        raise DataError(f"{folder} has neither *.parquet nor folders of images, <class>/<image files>")
    split = FolderSplit(classes, tuple(path.name for path in classes))
    if split.contents.passed_over:
        say_once(f"{folder}: {split.contents.passed_over}")
    return split


def _parquet_files(folder: Path) -> list[Path]:
    """The train split where one is named so; otherwise all files but those of a test split."""
    if train := parquet_splits(folder, TRAIN_NAMES):
        return train[0][1]
    for place in (folder, folder / "data"):
        if chosen := [file for file in parquet_in(place) if not file.name.casefold().startswith(TEST_NAMES)]:
            return chosen
    return []


def _has_images(folder: Path) -> bool:
    """False for a folder without files: a class that the client lacks.

    Raises:
        DataError: there are files, and no image.
        OSError: a folder cannot be listed.
    """
    found = contents(folder)
    if not found.images and (number := found.others.total() + len(found.nowhere)):
        raise DataError(
            f"{folder} has {number} files, and none is an image as we read them ({found.passed_over}); "
            "convert them to PNG, or take the folder away"
        )
    return bool(found.images)


def _renumbered(split: Split, data: DataConfig, place: str, *, at_server: bool = False) -> Rows:
    """(n,) the labels in the server's numbering, by name; -1 for images that are to be skipped.

    Raises:
        DataError: a class is unknown to the server, and data.unknown-classes = "refuse"; or labels that are no classes.
    """
    outside = split.labels < 0
    if split.classes:
        outside |= split.labels >= len(split.classes)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(f"{split.where(row)}: label {split.labels[row]} has no name; mend it or remove the row")
    # Only what occurs is named: a column of dates has numbers up to 20 million.
    there, which = np.unique(split.labels, return_inverse=True)
    if not split.classes and len(there) > max(MOST_NUMBERS, len(data.class_names)):
        raise DataError(
            f"{place}: the label column has {len(there)} different numbers, which are no classes; "
            "name another one as label-column"
        )
    names = [split.classes[label] if split.classes else str(label) for label in there.tolist()]
    known = {same_name(name): number for number, name in enumerate(data.class_names)}
    to_server = np.array([known.get(same_name(name), -1) for name in names], dtype=np.int64)
    labels: Rows = to_server[which]
    if strange := [name for name in names if same_name(name) not in known]:
        whose = "data.classes" if at_server else "the server"
        problem = f"{place}: {int((labels < 0).sum())} images of classes that {whose} does not know: "
        problem += _strange(strange, bool(split.classes), data)
        if data.unknown_classes == "skip":
            log.warning("%s", problem)
        elif at_server:  # its own images: nothing to hide
            raise DataError(f"{problem}, or set data.unknown-classes = 'skip'")
        else:
            log.error("%s", problem)
            raise _ToldError(
                f"{len(strange)} of this client's classes are unknown to the server (data.classes); the client's own "
                "log names them; rename them there, or set data.unknown-classes = 'skip'"
            )
    return labels


def _strange(strange: Sequence[str], named: bool, data: DataConfig) -> str:
    """Which classes are not in the server's list, what is, and what to do."""
    hints = [_hint(each, data) for each in strange[:SHOWN]]
    more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
    fix = "rename them, or take them out"
    if data.unknown_classes == "skip":
        fix = "they are left out (data.unknown-classes = 'skip')"
    if not named:
        fix = "the labels here are numbers: store their names, as text or as Hugging Face's ClassLabel"
        if strange == [str(len(data.class_names))]:
            fix += "; or do they begin at 1, and the server's at 0?"
    return f"{', '.join(hints)}{more}; its classes: {', '.join(map(repr, data.class_names))}; {fix}"


def _hint(name: str, data: DataConfig) -> str:
    by_lower = {known.lower(): known for known in data.class_names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"{name!r} (like {by_lower[near[0]]!r}?)" if near else repr(name)


def named_classes(config: Config) -> Config:
    """The config with the names of all classes in data.classes: as set, or the server's data's, or plain numerals.

    Raises:
        ConfigError: there is no data to take them from, as the clients evaluate.
        DataError: the server's data has another number of classes, or a name that no setting can hold.
    """
    names, number = config.data.class_names or _names_of_data(config), config.model.num_classes
    if len(names) != number:
        raise DataError(
            f"{config.data.path}: the test images are of {len(names)} classes, but model.num-classes = "
            f"{number}; make them equal, or name all classes in data.classes"
        )
    if bad := [name for name in names if SEPARATOR in name or name != name.strip()]:
        raise DataError(f"the class name {bad[0]!r} has a {SEPARATOR} or a blank at an end; rename the class")
    return replace(config, data=replace(config.data, classes=SEPARATOR.join(names)))


def _names_of_data(config: Config) -> tuple[str, ...]:
    numerals = tuple(map(str, range(config.model.num_classes)))
    if config.evaluate.where == "server":
        return open_split(config.data, "test", alone=True).classes or numerals
    if found_source(config.data).source == "digits" and numerals == DigitsSplit.classes:
        return numerals  # known without a look at an image
    raise ConfigError(
        "data.classes is empty, but with evaluate.where = 'clients' the server has no images to take the names from; "
        "set it to the names of all classes, such as 'benign | malignant'"
    )


@lru_cache(maxsize=1)
def load_own_test(data: DataConfig, model: ModelConfig) -> Images:
    """The server's test images, their classes found by name in `data.classes`."""
    split = open_split(data, "test", alone=True)
    place = f"{data.path or 'digits'}, test split"
    labels = _renumbered(split, data, place, at_server=True)
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise DataError(
            f"{place}: none of the {len(labels)} images is of a class of data.classes ({', '.join(data.class_names)}); "
            "rename the classes in one of the two"
        )
    rows = rows[kept(len(rows), data.test_limit, "test")]
    return Images(decode(split, rows, model.in_chans, model.img_size), torch.from_numpy(labels[rows]))

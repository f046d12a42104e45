"""Where images come from: digits, Parquet folders, ImageFolders and the Hugging Face Hub, all to one DataSet."""

import functools
import io
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.compute import return_memory
from ..common.errors import DataError, printable, say_once
from ..common.rng import stream
from ..config import DataConfig, ModelConfig
from .decode import Rows, Split, decode
from .images import DataSet, Images
from .layout import (
    TRAIN_NAMES,
    Contents,
    check_shards,
    class_folders,
    contents,
    folders_called,
    found_source,
    is_saved,
    listed,
    names_of,
    outside_classes,
    parquet_splits,
    same_name,
)
from .tables import HubTable, ParquetTable, Table, test_split, train_split

log = logging.getLogger("fedmitr")


def load(data: DataConfig, model: ModelConfig, *, with_test: bool = True) -> DataSet:
    """Load the images, each decoded once per process; the channels are the model's, the size is the source's own.

    With `data.validation`, that share of each class of the train split is for no client: it is `test`, and the
    source's own test split is not read. Shares and limits are drawn once for all seeds. Of the model, the image size is
    used only if the images differ in size. `with_test = False` leaves `test` empty, and its images unread.

    Raises:
        DataError: something is missing, corrupt, ambiguous or outside the classes. The thing is named.
    """
    train, classes = _split_of(data, model, "train")
    test = load_test(data, model)[0] if with_test else train.subset(torch.empty(0, dtype=torch.int64))
    return DataSet(train, test, classes)


def load_test(data: DataConfig, model: ModelConfig) -> tuple[Images, tuple[str, ...]]:
    """The images that are judged on, and the names of the classes; of the training images none is read.

    Raises:
        DataError: as in `load`.
    """
    return _split_of(data, model, "validation" if data.validation else "test")


def training_labels(data: DataConfig, model: ModelConfig) -> Tensor:
    """(n,) int64, of the images that `load` gives for training; no image is decoded.

    Raises:
        DataError: as in `load`.
    """
    split = open_split(data, "train")
    _check_labels(split, model.num_classes, data, "train")
    return torch.from_numpy(split.labels[_rows(split.labels, data, "train")])


def load_proxy_share(data: DataConfig, model: ModelConfig) -> Tensor:
    """The pixels (n, C, H, W) of the share `data.proxy` of the training images, which no client gets."""
    return _split_of(data, model, "proxy")[0].pixels


def _split_of(data: DataConfig, model: ModelConfig, name: str) -> tuple[Images, tuple[str, ...]]:
    if model.in_chans not in (1, 3):
        raise DataError(f"model.in-chans = {model.in_chans}, but images have 1 or 3 channels here; use one of these")
    return _load_split(data, model.in_chans, model.num_classes, model.img_size, name)


def _place(data: DataConfig, stored: str) -> str:
    return f"{data.path or 'digits'}, {stored} split"


@functools.lru_cache(maxsize=4)  # train and test of two data sets: one Ray actor serves many clients of the same data
def _load_split(
    data: DataConfig, in_chans: int, num_classes: int, img_size: int, name: str
) -> tuple[Images, tuple[str, ...]]:
    stored = "test" if name == "test" else "train"
    split = open_split(data, stored)
    _check_labels(split, num_classes, data, stored)
    place = _place(data, stored)
    rows = _rows(split.labels, data, name)
    if not len(rows):
        raise DataError(f"{place}: data.{name} = {getattr(data, name)} sets no image of any class aside; raise it")
    pixels = decode(split, rows, in_chans, img_size)
    return_memory()  # of the largest image
    log.info("%s: %d of %d images for %s", place, len(rows), len(split.labels), name)
    classes = split.classes or tuple(str(label) for label in range(num_classes))
    return Images(pixels, torch.from_numpy(split.labels[rows])), classes


def open_split(data: DataConfig, name: str, *, alone: bool = False) -> Split:
    """The split `train` or `test`, not decoded yet; its classes are those of the data set.

    The test split is read without the train split where that is not there, or `alone` leaves it aside; then its classes
    are its own.

    Raises:
        DataError: there is no such split, or its labels cannot be read.
    """
    data = found_source(data)
    if data.source == "digits":
        return _digits(name)
    with listed():
        if data.source == "imagefolder":
            return _folder_split(data_folder(data), name, alone=alone)
        train = None if alone else next(_tables(data, "train"), None)
        tests = _tables(data, "test")
        first = train if name == "train" else next(tests, None)
        if first is None:
            raise _absent(data, name)
        if name == "train":
            return train_split(first, tests, data)
        return test_split(train, itertools.chain([first], tests), data)


def _folder_split(folder: Path, name: str, *, alone: bool) -> "FolderSplit":
    has_train = not alone and folders_called(folder, TRAIN_NAMES)
    known = tuple(path.name for path in class_folders(folder, "train")) if has_train else ()
    folders = class_folders(folder, name, known)
    split = FolderSplit(folders, known or tuple(path.name for path in folders))
    beside = outside_classes(folders[0].parent)
    beside.add(split.contents)
    if beside.passed_over:
        say_once(f"{folders[0].parent}: {beside.passed_over}")
    return split


def _tables(data: DataConfig, name: str) -> Iterator[Table]:
    """The splits of the data set that may be meant by `train` or `test`, best first; each is opened when asked for."""
    if data.source == "parquet":
        folder = data_folder(data)
        return (ParquetTable(files, folder) for _, files in parquet_splits(folder, names_of(name)))
    stored = _hub_splits(data.path)
    there = {split.casefold(): split for split in stored}
    called = [there[alias] for alias in names_of(name) if alias in there]
    return (HubTable(data.path, stored[split], split) for split in called)


def _absent(data: DataConfig, name: str) -> DataError:
    """The data set has no split that may be meant by `train` or `test`."""
    first, *others = names_of(name)
    if data.source == "parquet":
        return DataError(
            f"{data_folder(data)} has no {first}*.parquet (or {', '.join(others)}; nor has its data/); "
            "data.path must be a folder with them"
        )
    return DataError(
        f"data.path = {data.path!r} has no split {first!r} (or {', '.join(others)}), but "
        f"{', '.join(map(repr, _hub_splits(data.path)))}; rename one of them"
    )


def _rows(labels: Rows, data: DataConfig, name: str) -> Rows:
    """The rows that `name` (train, validation, proxy or test) has of its split, rising."""
    rows = np.arange(len(labels), dtype=np.int64)
    if name != "test":
        validation = _aside(labels, data.validation)
        proxy = _aside(labels, data.validation + data.proxy) & ~validation
        rows = rows[{"train": ~(validation | proxy), "validation": validation, "proxy": proxy}[name]]
    limits = {"train": data.train_limit, "proxy": 0}
    return rows[kept(len(rows), limits.get(name, data.test_limit), name)]


def _aside(labels: Rows, share: float) -> NDArray[np.bool_]:
    """True: set aside. Of each class the same share, but never its last image.

    The same for every seed of an experiment, and a larger share holds the smaller ones.
    """
    aside = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=stream(0, "validation", label)).numpy()
        aside[rows[order[: min(round(share * len(rows)), len(rows) - 1)]]] = True
    return aside


def kept(total: int, limit: int, name: str) -> Rows:
    """Which rows the limit keeps, rising; the same for every seed of an experiment."""
    if not 0 < limit < total:
        return np.arange(total, dtype=np.int64)
    drawn = torch.randperm(total, generator=stream(0, "limit", name))[:limit]
    return np.asarray(drawn.sort().values.numpy(), dtype=np.int64)


def _check_labels(split: Split, num_classes: int, data: DataConfig, stored: str) -> None:
    labels, classes, place = split.labels, split.classes, _place(data, stored)
    if not len(labels):
        raise DataError(f"{place}: no images; put some there or choose another data.path")
    least, greatest = int(labels.min()), int(labels.max())
    there = len(classes) if classes else greatest + 1
    fix = f"set model.num-classes = {there}"
    if not classes and least == 1 and greatest == num_classes:
        raise DataError(
            f"{place}: labels begin at 1 ({least} to {greatest}), but classes are numbered from 0; subtract 1 from each"
        )
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        label = int(labels[row])
        fix = "remove the rows without a label" if label < 0 else fix
        raise DataError(f"{split.where(row)}: label {label} is outside 0..{num_classes - 1}; {fix}")
    if classes and there != num_classes:
        raise DataError(f"{place}: there are {there} classes, but model.num-classes = {num_classes}; {fix}")
    if not classes and least == 1 and there == num_classes and stored == "train":
        say_once(
            f"{place}: labels begin at 1 ({least} to {greatest}), so class 0 has no image here; where none is meant, "
            f"subtract 1 from each and set model.num-classes = {greatest}"
        )


@functools.cache
def _digits(name: str) -> "DigitsSplit":
    """Read once: scikit-learn parses the file anew, which takes longer than a tiny client's training."""
    return DigitsSplit(name)


class DigitsSplit:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, in one fixed stratified split of 80 to 20."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, name: str) -> None:
        # Here, since scikit-learn takes 150 MB, and no other source needs it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        self._name, rows = name, np.arange(len(digits.target))
        train, test = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
        rows = np.sort(train if name == "train" else test)
        self._pixels = np.rint(digits.images[rows] * 255 / 16).astype(np.uint8)
        self.labels: Rows = digits.target[rows].astype(np.int64)

    def where(self, row: int) -> str:
        return f"digits, {self._name} image {row}"

    def encoded(self, rows: Rows) -> Iterator[BinaryIO]:
        """As PGM files, which are the bare pixels behind a header."""
        return (io.BytesIO(b"P5 8 8 255\n" + self._pixels[row].tobytes()) for row in rows)


class ImageFiles:
    """Files of images, before they are decoded."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def where(self, row: int) -> str:
        return str(self._files[row])

    def encoded(self, rows: Rows) -> Iterator[BinaryIO]:
        """From the disk as they are decoded: a large file is never in memory as a whole."""
        for row in rows:
            place = self._files[row]
            try:
                file = place.open("rb")
            except OSError as error:
                raise DataError(f"{place} cannot be read ({error.strerror}); check its permissions") from error
            with file:
                yield file


class FolderSplit(ImageFiles):
    """Folders of images, each named by its class; of a data set the classes are train's, sorted by name."""

    def __init__(self, folders: Sequence[Path], classes: tuple[str, ...]) -> None:
        for name in (*classes, *(path.name for path in folders)):
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # results, pages and messages are all Unicode
                raise DataError(
                    f"{folders[0].parent}: the class folder '{printable(name)}' has a name that is not UTF-8; rename it"
                )
        self.classes = classes
        self.contents = Contents()  # of all folders, with what is passed over
        known: dict[str, int] = {}
        for label, name in enumerate(classes):
            if known.setdefault(same_name(name), label) != label:
                raise DataError(f"{folders[0].parent}: two class folders are called {name!r}; rename one of them")
        labels: list[int] = []
        for path in folders:
            if same_name(path.name) not in known:
                raise DataError(f"{path}: the class {path.name!r} is not in the train split; add it there or remove it")
            found = contents(path)
            if not found.images:
                there = f" ({found.passed_over})" if found.passed_over else ""
                raise DataError(f"{path}: no image files in this class folder{there}; add some or remove it")
            self.contents.add(found)
            labels += [known[same_name(path.name)]] * len(found.images)
        super().__init__(self.contents.images)
        self.labels: Rows = np.array(labels, dtype=np.int64)


def data_folder(data: DataConfig) -> Path:
    folder = Path(data.path).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"data.path = {data.path!r}: there is no folder {folder}; give the path of the data's folder")
    if is_saved(folder):
        raise DataError(f"{folder} was written by datasets' save_to_disk; set data.source = 'hub', which reads it")
    return folder


@functools.lru_cache(maxsize=2)
def _hub_splits(path: str) -> Mapping[str, Any]:
    """The splits, by name, of a data set on the Hub or of a local folder that `datasets` can read."""
    import datasets  # here: it takes pandas and two seconds with it

    local = Path(path).expanduser().absolute()
    if local.is_dir():
        check_shards(sorted(file for file in local.rglob("*") if "of" in file.name))
    try:
        if is_saved(local):
            found: Any = datasets.load_from_disk(str(local))
        else:
            found = datasets.load_dataset(str(local) if local.is_dir() else path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if local.is_dir():
            raise DataError(f"data.path = {path!r}: `datasets` cannot read {local} ({reason}); mend it") from error
        raise DataError(
            f"data.path = {path!r}: there is no folder {local}, and no data set can be loaded from the Hugging Face "
            f"Hub ({reason}); check the name and the network, or give the path of a folder"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        raise DataError(f"{local} was saved without splits; save a DatasetDict with 'train' and 'test'")
    return dict(found)

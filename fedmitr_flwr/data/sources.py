"""Where images come from: digits, Parquet folders, ImageFolders and the Hugging Face Hub, all to one DataSet."""

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..config import DataConfig, ModelConfig
from ..errors import DataError
from ..rng import stream
from .decode import Rows, Split, decode
from .flower_datasets import FederatedDataset
from .images import DataSet, Images
from .tables import TEST_NAMES, HubSplit, ParquetSplit, find_files

log = logging.getLogger("fedmitr")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves in its folder


class _Shape(NamedTuple):
    """The part of ModelConfig that loading depends on; the cache is keyed by no more."""

    in_chans: int
    num_classes: int
    img_size: int


def load(data: DataConfig, model: ModelConfig, *, with_test: bool = True) -> DataSet:
    """Load the images, each decoded once per process; the channels are the model's, the size is the source's own.

    With `data.validation`, that share of each class of the train split is nobody's to train on: it is `test`, and the
    source's own test split is not read.

    Args:
        data: the source, the limits and the share to set aside, both drawn once for all seeds.
        model: its channels and number of classes; its image size is used only if the images differ in size.
        with_test: False leaves `test` empty and the test split untouched: a client does not need it.

    Raises:
        DataError: something is missing, corrupt, ambiguous or outside the classes. The thing is named.
    """
    if model.in_chans not in (1, 3):
        raise DataError(f"model.in-chans = {model.in_chans}, but images have 1 or 3 channels here; use one of these")
    shape = _Shape(model.in_chans, model.num_classes, model.img_size)
    train, names = _load_split(data, shape, "train")
    classes = names or tuple(str(label) for label in range(model.num_classes))
    if not with_test:
        return DataSet(train, train.subset(torch.empty(0, dtype=torch.int64)), classes)
    if data.validation:
        return DataSet(train, _load_split(data, shape, "validation")[0], classes)
    test, test_names = _load_split(data, shape, "test")
    for ours, theirs in zip(classes, test_names or classes, strict=True):
        if ours != theirs:
            raise DataError(
                f"{data.path}: class {ours!r} of the train split is {theirs!r} in the test split; "
                "give both the same class names in the same order"
            )
    return DataSet(train, test, classes)


def load_proxy_share(data: DataConfig, model: ModelConfig) -> Tensor:
    """The pixels (n, C, H, W) of the share `data.proxy` of the training images, which no client gets."""
    return _load_split(data, _Shape(model.in_chans, model.num_classes, model.img_size), "proxy")[0].pixels


@functools.lru_cache(maxsize=4)  # train and test of two data sets: one Ray actor serves many clients of the same data
def _load_split(data: DataConfig, shape: _Shape, name: str) -> tuple[Images, tuple[str, ...] | None]:
    stored = "test" if name == "test" else "train"
    split = open_split(data, stored)
    place = f"{data.path or data.source}, {stored} split"
    _check_labels(split, shape.num_classes, place)
    rows = _rows(split.labels, data, name)
    if not len(rows):
        share = getattr(data, "proxy" if name == "proxy" else "validation")
        raise DataError(f"{place}: data.{name} = {share} sets no image of any class aside; raise it")
    pixels = decode(split, rows, shape.in_chans, shape.img_size)
    log.info("%s: %d of %d images for %s", place, len(rows), len(split.labels), name)
    return Images(pixels, torch.from_numpy(split.labels[rows])), split.classes


def open_split(data: DataConfig, name: str) -> Split:
    """The split `train` or `test`, not decoded yet."""
    if data.source == "digits":
        return DigitsSplit(name)
    if data.source == "hub":
        return _hub_split(data, name)
    folder = data_folder(data)
    if data.source == "parquet":
        return ParquetSplit(data, find_files(folder, _aliases(name)))
    classes = tuple(path.name for path in split_folders(folder, ("train",)))
    return FolderSplit(split_folders(folder, _aliases(name)), classes)


def _aliases(name: str) -> tuple[str, ...]:
    return TEST_NAMES if name == "test" else (name,)


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


def _check_labels(split: Split, num_classes: int, place: str) -> None:
    labels, classes = split.labels, split.classes
    if not len(labels):
        raise DataError(f"{place}: no images; put some there or choose another data.path")
    there = len(classes) if classes else int(labels.max()) + 1
    fix = f"set model.num-classes = {there}"
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        label = int(labels[row])
        fix = "remove the rows without a label" if label < 0 else fix
        raise DataError(f"{split.where(row)}: label {label} is outside 0..{num_classes - 1}; {fix}")
    if classes and there != num_classes:
        raise DataError(f"{place}: there are {there} classes, but model.num-classes = {num_classes}; {fix}")


class DigitsSplit:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, in one fixed stratified split of 80 to 20."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, name: str) -> None:
        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
        )
        self._name = name
        rows = np.sort(train if name == "train" else test)
        self._pixels = np.rint(digits.images[rows] * 255 / 16).astype(np.uint8)
        self.labels: Rows = digits.target[rows].astype(np.int64)

    def where(self, row: int) -> str:
        return f"digits, {self._name} image {row}"

    def encoded(self, rows: Rows) -> Iterator[bytes]:
        """As PGM files, which are the bare pixels behind a header."""
        return (b"P5 8 8 255\n" + self._pixels[row].tobytes() for row in rows)


class FolderSplit:
    """Folders of images, each named by its class; of a data set the classes are train's, sorted by name."""

    def __init__(self, folders: Sequence[Path], classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._files: list[Path] = []
        labels: list[int] = []
        for path in folders:
            if path.name not in classes:
                train = path.parent.parent / "train"
                raise DataError(f"{path}: the class {path.name!r} is not in {train}; add it there or remove it")
            files = images_in(path)
            if not files:
                raise DataError(f"{path}: no image files in this class folder; add some or remove it")
            self._files += files
            labels += [classes.index(path.name)] * len(files)
        self.labels: Rows = np.array(labels, dtype=np.int64)

    def where(self, row: int) -> str:
        return str(self._files[row])

    def encoded(self, rows: Rows) -> Iterator[bytes]:
        for row in rows:
            try:
                yield self._files[row].read_bytes()
            except OSError as error:
                raise DataError(
                    f"{self._files[row]} cannot be read ({error.strerror}); check its permissions"
                ) from error


def images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if _is_image(file))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()


def split_folders(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The class folders of the first of the splits `names` that is there."""
    for name in names:
        if (folder / name).is_dir():
            if inside := class_folders(folder / name):
                return inside
            raise DataError(f"{folder / name}: no class folders; an ImageFolder is {name}/<class>/<image files>")
    raise DataError(f"{folder} has no folder {names[0]}/; an ImageFolder is {names[0]}/<class>/<image files>")


def class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def data_folder(data: DataConfig) -> Path:
    folder = Path(data.path).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"data.path = {data.path!r}: there is no folder {folder}; give the path of the data's folder")
    if any((folder / marker).exists() for marker in _SAVED_TO_DISK):
        raise DataError(f"{folder} was written by datasets' save_to_disk; set data.source = 'hub', which reads it")
    return folder


def _hub_split(data: DataConfig, name: str) -> HubSplit:
    """A data set by its name on the Hub, or a local folder that `datasets` can read."""
    failures: list[str] = []
    for alias in _aliases(name):
        try:
            table = _hub_table(data.path, alias)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            failures.append(" ".join(str(error).split())[:200])
        else:
            return HubSplit(data, table, alias)
    raise DataError(
        f"data.path = {data.path!r}: cannot load the split {name!r} from the Hugging Face Hub ({failures[0]}); "
        "check the name and the network, or fetch its Parquet files and set data.source = 'parquet'"
    )


def _hub_table(path: str, split: str) -> Any:
    local = Path(path).expanduser()
    if not any((local / marker).exists() for marker in _SAVED_TO_DISK):
        name = str(local) if local.is_dir() else path
        return FederatedDataset(dataset=name, partitioners={}, shuffle=False).load_split(split)
    saved = datasets.load_from_disk(str(local))
    if not isinstance(saved, datasets.DatasetDict) or split not in saved:
        raise ValueError(f"it was saved without a split {split!r}")
    return saved[split]

"""What lies at a path: splits by their names, class folders, images, Parquet files; and what of it is passed over.

Nothing is decoded here. Files and folders that are hidden, or that an operating system or a file server keeps for
itself, are no data anywhere.
"""

import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from ..common.errors import DataError, say_once
from ..config import DataConfig

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")  # the first with labels

# What datasets' save_to_disk leaves in its folder, and what `datasets` makes splits of.
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")
_READ_BY_DATASETS = {".arrow", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tar", ".tsv", ".zip"}

# Folders and files of file servers and desktops whose names have no dot in front.
_SYSTEM = re.compile(
    r"\$recycle\.bin|#recycle|#snapshot|@eadir|@recently-snapshot|@recycle|@tmp|__macosx|__pycache__|desktop\.ini|"
    r"ehthumbs\.db|icon\r|lost\+found|recycler|system volume information|thumbs\.db|~snapshot"
)

# Formats of Pillow that hold no picture which it can decode by itself: stubs, films, pages for Ghostscript, Windows.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

_SHARD = re.compile(r"(?P<stem>.*?)[-_.](?P<number>\d+)[-_]of[-_](?P<total>\d+)(?P<rest>\D.*)?", re.DOTALL)


def names_of(split: str) -> tuple[str, ...]:
    """What `split`, train or test, may be called, best first."""
    return TEST_NAMES if split == "test" else TRAIN_NAMES


# --- the source


def found_source(data: DataConfig) -> DataConfig:
    """`data` with its source filled in, where it was left to be found.

    Raises:
        DataError: nothing that can be read is at `data.path`, or more than one layout.
    """
    if data.source != "auto":
        return data
    return replace(data, source=_source_at(data.path) if data.path else "digits")


def _source_at(path: str) -> str:
    folder = Path(path).expanduser().absolute()
    if folder.is_dir():
        with listed():
            return _source_of(folder)
    if folder.exists():
        raise DataError(f"data.path = {path!r} is a file; give the folder that it lies in")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return "hub"
    raise DataError(
        f"data.path = {path!r}: there is no folder {folder}; give the path of the data's folder, "
        "or owner/name of a data set of the Hugging Face Hub"
    )


def _source_of(folder: Path) -> str:
    if is_saved(folder):
        return "hub"
    tables = parquet_splits(folder, (*TRAIN_NAMES, *TEST_NAMES))
    splits = folders_called(folder, (*TRAIN_NAMES, *TEST_NAMES))
    classes = [split for split in splits if any(map(_has_image, subfolders(split)))]
    if tables and classes:
        raise DataError(
            f"{folder} has Parquet files ({tables[0][1][0].name}) and class folders ({classes[0].name}/); "
            "keep one of the two, or set data.source to 'parquet' or 'imagefolder'"
        )
    if tables:
        return "parquet"
    if classes:
        return "imagefolder"
    places = (folder, folder / "data", *splits)
    if any(file.suffix.lower() in _READ_BY_DATASETS for place in places for file in _files(place)):
        return "hub"
    if splits:
        return "imagefolder"  # which says what it lacks
    if any(map(_has_image, subfolders(folder))):
        raise DataError(f"{folder} has folders of images, but no split; an ImageFolder is train/<class>/<image files>")
    raise DataError(
        f"{folder} has neither train*.parquet, nor train/<class>/<image files>, nor files that `datasets` reads; "
        "give the path of the data's folder"
    )


def is_saved(folder: Path) -> bool:
    """Did datasets' save_to_disk write it?"""
    return any((folder / marker).exists() for marker in _SAVED_TO_DISK)


@contextmanager
def listed() -> Iterator[None]:
    """Turn an error of the operating system, as at a folder that may not be listed, into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); let this user read it, or take it out of the data"
        ) from error


# --- folders


def is_hidden(name: str) -> bool:
    """A file or folder that the user, a desktop or a file server does not count as contents."""
    return name.startswith((".", "~$")) or bool(_SYSTEM.fullmatch(name.casefold()))


def same_name(name: str) -> str:
    """File systems and tables write one name in different ways: an accent may be a letter of its own."""
    return unicodedata.normalize("NFC", name.strip())


def subfolders(folder: Path) -> list[Path]:
    """Those that are not hidden, by name; links to folders are folders."""
    return sorted(Path(entry.path) for entry in _entries(folder) if _kind(entry) == "folder")


def folders_called(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folders inside that are called so, upper or lower case, in the order of `names`.

    Raises:
        DataError: two differ in upper and lower case only.
    """
    there: dict[str, Path] = {}
    for path in subfolders(folder):
        other = there.setdefault(path.name.casefold(), path)
        if other != path and path.name.casefold() in names:
            raise DataError(f"{folder} has {other.name}/ and {path.name}/; keep one of the two")
    return [there[name] for name in names if name in there]


def class_folders(folder: Path, split: str, known: Iterable[str] = ()) -> list[Path]:
    """The class folders of the split `train` or `test` of an ImageFolder.

    A split without any, or with none of the `known` classes, if there are such, is passed over where another has them:
    unlabelled test images lie so.

    Raises:
        DataError: there is no such split, or none with class folders.
    """
    called = folders_called(folder, names_of(split))
    inside = {path: subfolders(path) for path in called}
    names = {same_name(name) for name in known}
    fitting = [path for path in called if not names or names & {same_name(each.name) for each in inside[path]}]
    for path in [path for path in fitting if inside[path]] or [path for path in called if inside[path]]:
        for before in called[: called.index(path)]:
            say_once(f"{before} has no folders of the classes and is passed over; {path} is the {split} split")
        return inside[path]
    if called:
        raise DataError(f"{called[0]}: no class folders; an ImageFolder is {split}/<class>/<image files>")
    first, *others = names_of(split)
    raise DataError(
        f"{folder} has no folder {first}/ (or {', '.join(others)}); an ImageFolder is {first}/<class>/<image files>"
    )


@dataclass
class Contents:
    """The images below a folder, and how many of what else is there."""

    images: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # files, by suffix
    hidden: Counter[str] = field(default_factory=Counter)  # folders, by name
    nowhere: list[str] = field(default_factory=list)  # links that lead nowhere, or to what is read anyway

    def add(self, more: "Contents") -> None:
        self.images += more.images
        self.others += more.others
        self.hidden += more.hidden
        self.nowhere += more.nowhere

    @property
    def passed_over(self) -> str:
        """What is no image, in words; "" if nothing."""
        parts = []
        if self.others:
            parts.append(f"{self.others.total()} files that are no pictures: {_by_number(self.others)}")
        if self.hidden:
            parts.append(f"{self.hidden.total()} hidden or system folders: {_by_number(self.hidden)}")
        if self.nowhere:
            parts.append(f"links that lead nowhere, or to what is read anyway: {', '.join(self.nowhere[:5])}")
        return f"passed over {'; '.join(parts)}" if parts else ""


def _by_number(counts: Counter[str]) -> str:
    shown = counts.most_common(8)
    more = counts.total() - sum(number for _, number in shown)
    return ", ".join(f"{name} {number}" for name, number in shown) + (f", others {more}" if more else "")


def contents(folder: Path) -> Contents:
    """Look through a folder and all below it. Links are followed, but nothing is read twice.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = Contents()
    around = {_place(parent) for parent in folder.resolve().parents}  # a link to one of them would bring other classes
    _look(folder, found, around)
    found.images.sort()
    return found


def outside_classes(split: Path) -> Contents:
    """What lies beside the class folders: pictures there have no class."""
    found = Contents()
    for entry in _entries(split, found):
        if _kind(entry) == "file":
            found.others["pictures outside of class folders" if is_image(entry.name) else _suffix(entry.name)] += 1
    return found


def _look(folder: Path, found: Contents, seen: set[tuple[int, int]]) -> None:
    if (place := _place(folder)) in seen:
        found.nowhere.append(str(folder))
        return
    seen.add(place)
    for entry in _entries(folder, found):
        kind = _kind(entry)
        if kind == "folder":
            _look(Path(entry.path), found, seen)
        elif kind != "file":
            found.nowhere.append(entry.path)
        elif is_image(entry.name):
            found.images.append(Path(entry.path))
        else:
            found.others[_suffix(entry.name)] += 1


def _place(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _entries(folder: Path, found: Contents | None = None) -> Iterator["os.DirEntry[str]"]:
    """What is not hidden; of what is, folders and pictures are counted in `found`."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if not is_hidden(entry.name):
                yield entry
            elif found is not None and entry.is_dir():
                found.hidden[entry.name] += 1
            elif found is not None and is_image(entry.name):
                found.others[f"hidden {_suffix(entry.name)}"] += 1


def _kind(entry: "os.DirEntry[str]") -> str:
    """One of folder, file and neither: a link that leads nowhere, a socket."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return "neither"
        raise


def _has_image(folder: Path) -> bool:
    """Whether there is one at once below; or in folders further below, each looked through."""
    return any(is_image(entry.name) for entry in _entries(folder)) or bool(contents(folder).images)


def is_image(name: str) -> bool:
    """By its suffix: every one that Pillow opens here."""
    return Path(name).suffix.lower() in _suffixes()


def _suffix(name: str) -> str:
    return Path(name).suffix.lower() or "no suffix"


@lru_cache(maxsize=1)
def _suffixes() -> frozenset[str]:
    from PIL import Image  # at its first use: the command line reads settings without it

    formats = Image.registered_extensions()
    known = {suffix for suffix, form in formats.items() if form in Image.OPEN and form not in _NO_PICTURES}
    return frozenset(known | {".mpo"})  # which Pillow opens as a JPEG


# --- Parquet files


def parquet_splits(folder: Path, names: Iterable[str]) -> list[tuple[str, list[Path]]]:
    """(name, files) of each of the splits `names` that is there, in that order.

    The files lie in the folder, in its `data/`, or in a folder of the split's name. `NAME.parquet` goes before
    `NAME-00000-of-00002.parquet`, and that before any other `NAME*.parquet`, so that copies beside a split are not
    read twice.
    """
    found: list[tuple[str, list[Path]]] = []
    for name in names:
        for place in (folder, folder / "data"):
            files = _parquet_called(place, name)
            if files and all(files != others for _, others in found):
                found.append((name, files))
            if files:
                break
    return found


def _parquet_called(place: Path, name: str) -> list[Path]:
    files = parquet_in(place)
    called = [file for file in files if file.stem.casefold().startswith(name)]
    exact = [file for file in called if file.stem.casefold() == name]
    shards = [file for file in called if (match := _SHARD.fullmatch(file.stem.casefold())) and match["stem"] == name]
    chosen = exact or shards or called
    rest = [file.name for file in called if file not in chosen and _first_word(file.stem) == name]
    if rest:
        say_once(f"{place}: the split {name!r} is {chosen[0].name}; passed over {', '.join(rest[:5])}")
    if not chosen and place.is_dir():
        for inside in folders_called(place, (name, f"{name}.parquet")):
            chosen = chosen or parquet_in(inside)
    return chosen


def _first_word(stem: str) -> str:
    return re.split(r"[\W\d_]", stem.casefold())[0]


def parquet_in(place: Path) -> list[Path]:
    """The Parquet files right there, by name."""
    return [file for file in _files(place) if file.suffix.lower() == ".parquet"]


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(Path(entry.path) for entry in _entries(place) if _kind(entry) == "file")


def check_shards(files: Iterable[Path]) -> None:
    """Raise DataError where `NAME-00000-of-00002` stands without its sisters, whatever its suffix or a hash behind."""
    sets: dict[tuple[Path, str, str], list[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            sets.setdefault((file.parent, match["stem"], match["total"]), []).append(int(match["number"]))
    for (parent, stem, total), numbers in sets.items():
        there, wanted = set(numbers), int(total)
        if len(there) != wanted or there not in (set(range(wanted)), set(range(1, wanted + 1))):
            raise DataError(f"{parent} has {len(there)} of the {wanted} shards of {stem!r}; fetch the rest")
        if len(numbers) > wanted:
            raise DataError(f"{parent} has shards of {stem!r} more than once; keep one of each")
    for parent, stem, total in sets:
        if other := [each[2] for each in sets if each[:2] == (parent, stem) and each[2] != total]:
            raise DataError(f"{parent} has {stem!r} in {total} shards and in {other[0]}; keep one of the two")

"""Tables of images: folders of Parquet files, and data sets of the Hugging Face Hub."""

import bisect
import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HUB_CACHE

from ..common.errors import DataError, say_once
from ..config import DataConfig
from .decode import Rows
from .labels import Labels, all_differ, has_none, is_whole, kind_of, read, together
from .layout import check_shards

_USUAL_LABELS = ("label", "labels", "class", "target", "fine_label")  # the first that is there; upper case, too
_BATCH = 1000
_WANTED = {"image": "encoded images", "label": "labels"}


class NoLabelsError(DataError):
    """A table without any column that could hold labels."""


class Table(Protocol):
    """Rows with images, of one split."""

    place: str  # for messages
    schema: pa.Schema

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """The place of a row, for messages."""

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""

    def images(self, name: str, rows: Rows) -> Iterator[bytes]:
        """The encoded images of `rows` (rising) in a column."""


class ParquetTable:
    """One split's shards, read one row group at a time."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        """Open the files; images that they name in place of holding them must lie in `folder`."""
        check_shards(files)
        self.files, self._folder = files, folder
        self.place = str(files[0])
        self._parquet: list[pq.ParquetFile] = []
        for file in files:
            with _readable(file):
                self._parquet.append(pq.ParquetFile(file))
            self.schema = self._parquet[0].schema_arrow
            if not self._parquet[-1].schema_arrow.equals(self.schema, check_metadata=False):
                raise DataError(f"{file} has other columns than {files[0]}; shards of one split must agree")
        self._ends = np.cumsum([parquet.metadata.num_rows for parquet in self._parquet]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, row: int) -> str:
        shard = bisect.bisect_right(self._ends, row)
        return f"{self.files[shard]} row {row - (self._ends[shard - 1] if shard else 0)}"

    def images(self, name: str, rows: Rows) -> Iterator[bytes]:
        start = 0
        for file, parquet in zip(self.files, self._parquet, strict=True):
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                wanted = rows[(rows >= start) & (rows < stop)]
                if len(wanted):
                    with _readable(file):
                        column = parquet.read_row_group(group, columns=[name]).column(name)
                    cells = (column[row - start] for row in wanted.tolist())
                    yield from _contents(cells, map(self.where, wanted.tolist()), file.parent, (self._folder,))
                start = stop

    def column(self, name: str) -> pa.ChunkedArray:
        chunks: list[pa.Array] = []
        for file, parquet in zip(self.files, self._parquet, strict=True):
            with _readable(file):
                chunks += parquet.read(columns=[name]).column(name).chunks
        return pa.chunked_array(chunks, self.schema.field(name).type)


class HubTable:
    """One split of a `datasets.Dataset`."""

    def __init__(self, path: str, dataset: Any, split: str) -> None:
        self.place = f"{path}, split {split!r},"
        self._dataset = dataset
        self.schema = dataset.features.arrow_schema
        from datasets import config  # where it keeps the files of data sets whose tables name them

        caches = HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.EXTRACTED_DATASETS_PATH
        self._folder = Path(path).expanduser().absolute()
        self._roots = (self._folder, self._folder.resolve(), *(Path(cache).absolute() for cache in caches))

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, row: int) -> str:
        return f"{self.place} row {row}"

    def images(self, name: str, rows: Rows) -> Iterator[bytes]:
        table = self._dataset.select(rows).select_columns([name]).with_format("arrow")
        for start, batch in zip(range(0, len(rows), _BATCH), table.iter(batch_size=_BATCH), strict=True):
            places = map(self.where, rows[start : start + _BATCH].tolist())
            yield from _contents(batch.column(name), places, self._folder, self._roots)

    def column(self, name: str) -> pa.ChunkedArray:
        return self._dataset.select_columns([name]).with_format("arrow")[:].column(name)


class TableImages:
    """The images of a table's column; no label is read."""

    def __init__(self, table: Table, image: str) -> None:
        self._table, self._image = table, image

    def where(self, row: int) -> str:
        return self._table.where(row)

    def encoded(self, rows: Rows) -> Iterator[BinaryIO]:
        return map(io.BytesIO, self._table.images(self._image, rows))


class TableSplit(TableImages):
    """With their labels."""

    def __init__(self, table: Table, image: str, labels: Labels) -> None:
        super().__init__(table, image)
        self.labels: Rows = labels.numbers
        self.classes: tuple[str, ...] | None = labels.names


def train_split(train: Table, tests: Iterable[Table], data: DataConfig) -> TableSplit:
    """Classes that are text are those of train and test together, unless `data.validation` leaves the test unread."""
    image, label = find_columns(train, data)
    labels = read_labels(train, label)
    if labels.is_text and not data.validation:
        with contextlib.suppress(NoLabelsError):
            labels, _ = _matched(labels, _first_labelled(tests, data, label)[1], train, data)
    return TableSplit(train, image, labels)


def test_split(train: Table | None, tests: Iterable[Table], data: DataConfig) -> TableSplit:
    """The first test split that has labels, from the columns that `train`, if it is there, has.

    Raises:
        DataError: none has labels; or they are other classes than train's.
    """
    if train is None:
        table, labels = _first_labelled(tests, data)
        return TableSplit(table, find_images(table, data.image_column), labels)
    image, label = find_columns(train, data)
    table, labels = _first_labelled(tests, data, label)
    if kind_of(train.schema.field(label).type) == "text":  # all text of train decides the classes, or what it declares
        known = read_labels(train, label)
    else:
        known = Labels(np.zeros(0, np.int64), _declared(train, label))
    return TableSplit(table, image, _matched(known, labels, train, data)[1])


def own_split(table: Table, data: DataConfig) -> TableSplit:
    """A split for itself."""
    image, label = find_columns(table, data)
    return TableSplit(table, image, read_labels(table, label))


def _first_labelled(tests: Iterable[Table], data: DataConfig, column: str = "") -> tuple[Table, Labels]:
    """The first test split that has labels, in `column` or else where they are found; those before it are logged.

    Raises:
        NoLabelsError: none has labels.
    """
    passed: list[str] = []
    for table in tests:
        name = column
        if not name:
            with contextlib.suppress(NoLabelsError):
                name = find_labels(table, data.label_column)
        if name not in table.schema.names:
            passed.append(f"{table.place} has no column {name or 'of labels'!r}")
        elif has_none(table.column(name)):
            passed.append(f"{table.place} has no labels: of {len(table)} rows, none has one in {name!r}")
        else:
            for line in passed:
                say_once(f"{line}; it is passed over, and {table.place} is the test split")
            return table, read_labels(table, name)
    raise NoLabelsError(
        f"{passed[0] if passed else 'there is no test split'}; label them, or judge on a share of the training images, "
        "which data.validation = 0.2 sets aside"
    )


def _matched(train: Labels, test: Labels, where: Table, data: DataConfig) -> tuple[Labels, Labels]:
    """Both in one numbering, with train's names."""
    if train.is_text != test.is_text:
        kinds = ("text", "numbers") if train.is_text else ("numbers", "text")
        raise DataError(f"{where.place}: labels are {kinds[0]} here and {kinds[1]} in the test split; make them alike")
    if train.is_text:
        if more := sorted({*(test.names or ())} - {*(train.names or ())}):
            say_once(f"{where.place}: no training image is of the classes {', '.join(map(repr, more[:5]))} of the test")
        return together(train, test)
    for ours, theirs in itertools.zip_longest(train.names or (), test.names or train.names or ()):
        if ours != theirs and train.names:
            raise DataError(
                f"{data.path}: class {ours!r} of the train split is {theirs!r} in the test split; "
                "give both the same class names in the same order"
            )
    return train, test._replace(names=test.names or train.names)


# --- columns


def find_columns(table: Table, data: DataConfig) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    return find_images(table, data.image_column), find_labels(table, data.label_column)


def find_images(table: Table, configured: str, fix: str = "") -> str:
    """The image column: as configured, else the only one that can be meant.

    Raises:
        DataError: it is missing, of an unsuitable type, or ambiguous; the columns that would do are listed.
    """
    images = [field.name for field in table.schema if _holds_images(field.type)]
    typed = _of_feature(table, "Image", images)
    candidates = [configured] if configured in images else typed if len(typed) == 1 else images
    if len(candidates) == 1 and configured in ("", candidates[0]):
        return candidates[0]
    raise _refusal(table, "image", configured, images, fix, several=len(candidates) > 1)


def find_labels(table: Table, configured: str) -> str:
    """The label column: as configured, else the ClassLabel, else by its name, else the only one that can be meant.

    Raises:
        NoLabelsError: no column could hold labels.
        DataError: it is missing, of an unsuitable type, or ambiguous; the columns that would do are listed.
    """
    suitable: list[str] = [field.name for field in table.schema if kind_of(field.type)]
    if configured in suitable:
        return configured
    typed = _of_feature(table, "ClassLabel", suitable)
    there = {name.casefold(): name for name in table.schema.names} | {name: name for name in table.schema.names}
    usual = next((there[name] for name in _USUAL_LABELS if name in there), "")
    if not configured and len(typed) == 1:
        if usual and usual != typed[0]:
            say_once(f"{table.place}: labels are read from the ClassLabel {typed[0]!r}, not from {usual!r}")
        return typed[0]
    if not configured and usual in suitable:
        return usual
    plausible = [name for name in suitable if is_whole(table.column(name)) and not all_differ(table.column(name))]
    if not configured and not usual and len(plausible) == 1:
        say_once(f"{table.place}: labels are read from the column {plausible[0]!r}; no other can be meant")
        return plausible[0]
    good = []
    for name in plausible:
        with contextlib.suppress(DataError):
            read_labels(table, name)
            good.append(name)
    raise _refusal(table, "label", configured or usual, good, several=len(plausible) > 1)


def _refusal(
    table: Table, kind: str, name: str, good: Sequence[str] = (), fix: str = "", *, several: bool = False
) -> DataError:
    """Of the `image` or `label` column; only columns that would be taken are proposed."""
    wanted, fix = _WANTED[kind], fix or f"set data.{kind}-column to one of: "
    there = {field.name: f"{field.name} ({_short(field.type)})" for field in table.schema}
    if name in there:
        problem = f"column {name!r} ({_short(table.schema.field(name).type)}) does not hold {wanted}"
    elif name:
        problem = f"has no column {name!r}"
    else:
        problem = f"has {'several columns' if several else 'no column'} with {wanted}"
    if good:
        return DataError(f"{table.place} {problem}; {fix}{', '.join(there[each] for each in good)}")
    error = NoLabelsError if kind == "label" and not name else DataError
    return error(f"{table.place} {problem}; none of its columns would do: {', '.join(there.values())}")


def read_labels(table: Table, name: str) -> Labels:
    """All labels of a column."""
    if not kind_of(table.schema.field(name).type):
        raise _refusal(table, "label", name)
    return read(table.column(name), _declared(table, name), table.where)


def _declared(table: Table, name: str) -> tuple[str, ...] | None:
    return tuple(_features(table)[name].names) if _of_feature(table, "ClassLabel", [name]) else None


def _of_feature(table: Table, feature: str, names: Sequence[str]) -> list[str]:
    features = _features(table)
    return [name for name in names if type(features.get(name)).__name__ == feature]


def _features(table: Table) -> Mapping[str, Any]:
    """What Hugging Face's metadata says of the columns."""
    text = (table.schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text else None
        if not features:
            return {}
        from datasets import Features  # here: it takes pandas and two seconds with it

        found: Mapping[str, Any] = Features.from_dict(features)
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{table.place} has Hugging Face metadata that this version of datasets cannot read; upgrade datasets"
        ) from error


def _short(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else str(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_binary(values) or pa.types.is_large_binary(values) or pa.types.is_binary_view(values))


def _holds_images(kind: pa.DataType) -> bool:
    """Bytes, or the struct of bytes and path that Hugging Face's Image feature is stored as."""
    if pa.types.is_struct(kind):
        names_files = kind.get_field_index("path") >= 0 and kind_of(kind.field("path").type) == "text"
        there = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        return there is not None and (_is_bytes(there) or (pa.types.is_null(there) and names_files))
    return _is_bytes(kind)


# --- cells


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{file} is not a readable Parquet file ({reason}); fetch it again") from error


def _contents(cells: Iterable[pa.Scalar], places: Iterable[str], base: Path, roots: Sequence[Path]) -> Iterator[bytes]:
    """The bytes in each cell, or in the file that it names."""
    for cell, place in zip(cells, places, strict=True):
        value = cell.as_py()
        path = None
        if isinstance(value, dict):
            value, path = value["bytes"], value.get("path")
        if value is None and path:
            value = _named_file(path, place, base, roots)
        if value is None:
            raise DataError(f"{place} has no image; remove the row")
        yield value


def _named_file(path: str, place: str, base: Path, roots: Sequence[Path]) -> bytes:
    """A file that a cell names, relative to `base`; a table may name no file outside of `roots`."""
    file = Path(os.path.normpath(base / path))
    if not any(file.is_relative_to(root) for root in roots):
        raise DataError(
            f"{place}: the image file {path!r} is outside of the data's folder, {roots[0]}; "
            "put it there and name it relative to the table, or store its bytes"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{place}: the image file {file} cannot be read ({error.strerror})") from error

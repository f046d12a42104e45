"""Tables of images: folders of Parquet files, and data sets of the Hugging Face Hub."""

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import DataConfig
from ..errors import DataError
from .decode import Rows

TEST_NAMES = ("test", "validation", "val")  # the first of these that is there is the test split
_USUAL_LABELS = ("label", "labels", "fine_label")
_BATCH = 1000
_SET = "set data.{}-column to one of its columns"


class ParquetImages:
    """The images of one split's shards, read one row group at a time."""

    def __init__(self, files: list[Path], image_column: str = "", fix: str = _SET) -> None:
        """Find the column: the one of this name, or the only one that can be meant; what cannot be has this `fix`."""
        self.files = files
        self._parquet = [_open(file) for file in files]
        self.schema = self._parquet[0].schema_arrow
        self.image = find_images(self.schema, image_column, str(files[0]), fix)
        for file, parquet in zip(files, self._parquet, strict=True):
            if not parquet.schema_arrow.equals(self.schema, check_metadata=False):
                raise DataError(f"{file} has other columns than {files[0]}; shards of one split must agree")
        self._ends = np.cumsum([parquet.metadata.num_rows for parquet in self._parquet]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, row: int) -> str:
        shard = bisect.bisect_right(self._ends, row)
        return f"{self.files[shard]} row {row - (self._ends[shard - 1] if shard else 0)}"

    def encoded(self, rows: Rows) -> Iterator[bytes]:
        start = 0
        for file, parquet in zip(self.files, self._parquet, strict=True):
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                wanted = rows[(rows >= start) & (rows < stop)]
                if len(wanted):
                    column = _read(parquet, file, self.image, group).take(pa.array(wanted - start))
                    places = (self.where(row) for row in wanted.tolist())
                    yield from _cells(column, places, file.parent)
                start = stop

    def column(self, name: str) -> list[pa.ChunkedArray]:
        """A whole column, shard by shard."""
        return [_read(parquet, file, name) for file, parquet in zip(self.files, self._parquet, strict=True)]


class ParquetSplit(ParquetImages):
    """With their labels."""

    def __init__(self, data: DataConfig, files: list[Path], *, named: bool = False) -> None:
        """Read the labels; `named` lets them be text, too."""
        super().__init__(files, data.image_column)
        self.label = find_labels(self.schema, data.label_column, str(files[0]), named=named)
        columns = self.column(self.label)
        self.labels: Rows
        self.classes: tuple[str, ...] | None
        if _is_text(self.schema.field(self.label).type):
            self.labels, self.classes = _from_text(columns, self.where)
        else:
            self.labels, self.classes = _to_labels(columns, self.where), _class_names(self.schema, self.label)


class HubSplit:
    """One split of a `datasets.Dataset`."""

    def __init__(self, data: DataConfig, dataset: Any, name: str) -> None:
        self.place = f"{data.path}, split {name!r},"
        self._dataset = dataset
        schema = dataset.features.arrow_schema
        self.image = find_images(schema, data.image_column, self.place)
        self.label = find_labels(schema, data.label_column, self.place)
        column = dataset.select_columns([self.label]).with_format("arrow")[:].column(self.label)
        self.labels = _to_labels([column], self.where)
        self.classes = _class_names(schema, self.label)

    def where(self, row: int) -> str:
        return f"{self.place} row {row}"

    def encoded(self, rows: Rows) -> Iterator[bytes]:
        table = self._dataset.select(rows).select_columns([self.image]).with_format("arrow")
        places = (self.where(row) for row in rows.tolist())
        for batch in table.iter(batch_size=_BATCH):
            yield from _cells(batch.column(self.image), itertools.islice(places, len(batch)), Path())


def find_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The Parquet files of the first of the splits `names` that is there: `test.parquet`, or its shards.

    They lie in the folder or in its `data/`. `NAME.parquet` goes before `NAME-00000-of-00002.parquet`, and that
    before any other `NAME*.parquet`, so that copies beside a split are not read twice.

    Raises:
        DataError: there is none, or a shard is missing.
    """
    for name, place in itertools.product(names, (folder, folder / "data")):
        for pattern in (f"{name}.parquet", f"{name}-[0-9]*-of-[0-9]*.parquet", f"{name}*.parquet"):
            if files := sorted(place.glob(pattern)):
                check_shards(files)
                return files
    raise DataError(f"{folder} has no {names[0]}*.parquet (nor has its data/); data.path must be a folder with them")


def find_images(schema: pa.Schema, configured: str, place: str, fix: str = _SET) -> str:
    """The image column: as configured, else the only one that can be meant.

    Raises:
        DataError: it is missing, of an unsuitable type, or ambiguous; the columns there are listed.
    """
    features = _features(schema, place)
    images = [field.name for field in schema if _holds_images(field.type)]
    typed = [name for name in images if isinstance(features[name], datasets.Image)]
    return _choose("image", configured, images, typed if len(typed) == 1 else images, schema, place, fix)


def find_labels(schema: pa.Schema, configured: str, place: str, *, named: bool = False) -> str:
    """The label column, as `find_images`: whole numbers, or with `named` also text."""
    features = _features(schema, place)
    suitable = [field.name for field in schema if pa.types.is_integer(field.type) or (named and _is_text(field.type))]
    labels = [name for name in suitable if isinstance(features[name], datasets.ClassLabel)]
    if len(labels) != 1:
        labels = [name for name in _USUAL_LABELS if name in suitable][:1] or suitable
    return _choose("label", configured, suitable, labels, schema, place, _SET)


def _choose(
    kind: str, configured: str, suitable: list[str], candidates: list[str], schema: pa.Schema, place: str, fix: str
) -> str:
    if configured in suitable or (not configured and len(candidates) == 1):
        return configured or candidates[0]
    there = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
    fix = f"{fix.format(kind)}: {there}"
    wanted = "encoded images" if kind == "image" else "class numbers"
    if configured and configured in schema.names:
        raise DataError(f"{place} column {configured!r} does not hold {wanted}; {fix}")
    if configured:
        raise DataError(f"{place} has no column {configured!r}; {fix}")
    problem = f"several columns with {wanted}" if candidates else f"no column with {wanted}"
    raise DataError(f"{place} has {problem}; {fix}")


def _short(kind: pa.DataType) -> str:
    return "struct" if pa.types.is_struct(kind) else str(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    values = kind.value_type if pa.types.is_dictionary(kind) else kind  # pandas' categories
    return bool(pa.types.is_string(values) or pa.types.is_large_string(values))


def _holds_images(kind: pa.DataType) -> bool:
    """Bytes, or the struct of bytes and path that Hugging Face's Image feature is stored as."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _features(schema: pa.Schema, place: str) -> Any:
    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{place} has Hugging Face metadata that this version of datasets cannot read; upgrade datasets"
        ) from error


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    feature = datasets.Features.from_arrow_schema(schema)[label]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(file, error) from error


def _read(parquet: pq.ParquetFile, file: Path, column: str, group: int | None = None) -> pa.ChunkedArray:
    try:
        table = parquet.read(columns=[column]) if group is None else parquet.read_row_group(group, columns=[column])
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(file, error) from error
    return table.column(column)


def _corrupt(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120]
    return DataError(f"{file} is not a readable Parquet file ({reason}); fetch it again")


def _require_labels(columns: list[pa.ChunkedArray], where: Any) -> list[pa.Array]:
    """The chunks of all columns, none of which has an empty cell."""
    chunks = [chunk for column in columns for chunk in column.chunks]
    nulls = np.concatenate([chunk.is_null().to_numpy(zero_copy_only=False) for chunk in chunks] or [np.zeros(0, bool)])
    if nulls.any():
        raise DataError(f"{where(int(nulls.argmax()))} has no label; remove the row or label it")
    return chunks


def _from_text(columns: list[pa.ChunkedArray], where: Any) -> tuple[Rows, tuple[str, ...]]:
    """Numbers for names, which are sorted."""
    labels = [name for chunk in _require_labels(columns, where) for name in chunk.to_pylist()]
    numbers = {name: number for number, name in enumerate(sorted(set(labels)))}
    return np.array([numbers[name] for name in labels], dtype=np.int64), tuple(numbers)


def _to_labels(columns: list[pa.ChunkedArray], where: Any) -> Rows:
    chunks = _require_labels(columns, where)
    arrays = [chunk.to_numpy(zero_copy_only=False).astype(np.int64) for chunk in chunks]
    return np.concatenate(arrays or [np.zeros(0, np.int64)])


def _cells(column: pa.ChunkedArray, places: Iterable[str], base: Path) -> Iterator[bytes]:
    """The bytes in each cell, or in the file that it names (relative paths from `base`)."""
    for cell, place in zip(column, places, strict=True):
        value = cell.as_py()
        path = None
        if isinstance(value, dict):
            value, path = value["bytes"], value.get("path")
        if value is None and path:
            try:
                value = (base / path).read_bytes()
            except OSError as error:
                raise DataError(f"{place}: the image file {base / path} cannot be read ({error.strerror})") from error
        if value is None:
            raise DataError(f"{place} has no image; remove the row")
        yield value


def check_shards(files: list[Path]) -> None:
    """Raise DataError where `NAME-00000-of-00002.parquet` stands without its sisters."""
    for file in files:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)\.parquet", file.name):
            wanted = int(match[2])
            if len(files) != wanted:
                raise DataError(
                    f"{file.parent} has {len(files)} of the {wanted} shards of {match[1]!r}; fetch the rest"
                )

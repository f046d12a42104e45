"""Labels as tables have them - text, truth values, whole numbers of any type - to class numbers and names."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..common.errors import DataError
from .decode import Rows
from .layout import same_name

Where = Callable[[int], str]


class Labels(NamedTuple):
    numbers: Rows  # (n,) int64
    names: tuple[str, ...] | None  # by number, where the column has them
    is_text: bool = False  # the names are those that occur, sorted: another split may have more


def kind_of(stored: pa.DataType) -> str:
    """One of text, boolean, integer and float; "" where no label can be of this type."""
    values = stored.value_type if pa.types.is_dictionary(stored) else stored  # pandas' categories
    tests = {
        "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        "boolean": (pa.types.is_boolean,),
        "integer": (pa.types.is_integer,),
        "float": (pa.types.is_floating, pa.types.is_decimal),
    }
    return next((kind for kind, any_of in tests.items() if any(test(values) for test in any_of)), "")


def read(column: pa.ChunkedArray, declared: Sequence[str] | None, where: Where) -> Labels:
    """The labels of a column whose `kind_of` is not ""; `declared` are the names of Hugging Face's ClassLabel, if any.

    Raises:
        DataError: a row has no label, or a number that is not whole.
    """
    kind = kind_of(column.type)
    if kind == "text":
        return _from_text(_plain(column, pa.large_string(), where), where)
    values = _plain(column, pa.float64() if kind == "float" else pa.int64(), where)
    numbers = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in values.chunks] or [np.zeros(0)])
    if kind == "float":
        _require_whole(numbers, where)
    names = ("False", "True") if kind == "boolean" else None
    return Labels(numbers.astype(np.int64), tuple(declared) if declared else names)


def has_none(column: pa.ChunkedArray) -> bool:
    """Has no row a label? Data sets mark so the test rows whose labels they keep for themselves."""
    kind = kind_of(column.type)
    if not len(column) or pa.types.is_null(column.type) or column.null_count == len(column):
        return True
    values = (value for value in (cell.as_py() for cell in column) if value is not None)
    if kind == "text":
        return not any(value.strip() for value in values)
    return bool(kind) and not any(value >= 0 for value in values)  # NaN is not


def is_whole(column: pa.ChunkedArray) -> bool:
    """False: a column of numbers with a fraction, such as weights, which are no classes."""
    if kind_of(column.type) != "float":
        return True
    values = _decoded(column).cast(pa.float64()).drop_null().to_numpy()
    return bool((values == np.floor(values)).all())


def all_differ(column: pa.ChunkedArray) -> bool:
    """Of many rows, each has a value of its own: names of files, not of classes."""
    return len(column) > FEW and pc.count_distinct(_decoded(column)).as_py() == len(column)


FEW = 10  # rows, up to which all may be of different classes


def together(first: Labels, second: Labels) -> tuple[Labels, Labels]:
    """Two splits' text labels, numbered by all the names of both, sorted."""
    names = tuple(sorted({*(first.names or ()), *(second.names or ())}))
    return _numbered_by(names, first), _numbered_by(names, second)


def _numbered_by(names: tuple[str, ...], labels: Labels) -> Labels:
    places = np.array([names.index(name) for name in labels.names or ()], dtype=np.int64)
    return Labels(places[labels.numbers] if len(places) else labels.numbers, names, is_text=True)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _plain(column: pa.ChunkedArray, wanted: pa.DataType, where: Where) -> pa.ChunkedArray:
    if column.null_count:
        nulls = np.concatenate([chunk.is_null().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        raise DataError(f"{where(int(nulls.argmax()))} has no label; remove the row or label it")
    try:
        return _decoded(column).cast(wanted)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where(0)} and below: labels that cannot be read ({error}); mend them") from error


def _require_whole(numbers: np.ndarray, where: Where) -> None:
    whole = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < 2**53)
    if not whole.all():
        row = int(whole.argmin())
        if np.isnan(numbers[row]):
            raise DataError(f"{where(row)} has no label (NaN); remove the row or label it")
        raise DataError(f"{where(row)}: label {numbers[row]:g} is no whole number, so it names no class; mend it")


def _from_text(column: pa.ChunkedArray, where: Where) -> Labels:
    """Numbers for names, which are sorted."""
    try:
        labels = [same_name(name) for name in column.to_pylist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where(0)} and below: labels that are not UTF-8; store them as such") from error
    if "" in labels:
        raise DataError(f"{where(labels.index(''))} has no label (empty text); remove the row or label it")
    numbers = {name: number for number, name in enumerate(sorted(set(labels)))}
    return Labels(np.array([numbers[name] for name in labels], dtype=np.int64), tuple(numbers), is_text=True)

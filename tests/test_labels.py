"""Labels of every type, in every source, have the numbers that their sorted names give."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import a_table, parquet, picture, write_splits
from tiny import SIZES, small

from fedmitr_flwr.common.errors import DataError
from fedmitr_flwr.config import Config, DataConfig
from fedmitr_flwr.data.own import Place, load_own, load_own_test
from fedmitr_flwr.data.sources import load, open_split
from fedmitr_flwr.resolve import resolve

TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
WHOLE = (pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.dictionary(pa.int8(), pa.int64()))
FLOATS = (pa.float32(), pa.float64(), pa.decimal128(5, 1))
NOT_IN_DATASETS = (pa.string_view(), pa.binary_view())

names = st.lists(
    st.text("abcXYZ é高", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=2, max_size=4, unique=True
)


def column(kind: pa.DataType, values: list[object]) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


@settings(derandomize=True, max_examples=40)
@given(
    kind=st.sampled_from([*TEXT, *WHOLE, *FLOATS, pa.bool_(), "ClassLabel"]),
    source=st.sampled_from(["parquet", "hub", "own", "own test"]),
    called=names,
    image=st.sampled_from([pa.binary(), pa.large_binary(), pa.binary_view()]),
    draw=st.data(),
)
def test_labels_of_every_type_in_every_source(
    tmp_path_factory: pytest.TempPathFactory,
    kind: object,
    source: str,
    called: list[str],
    image: object,
    draw: st.DataObject,
) -> None:
    numbers = st.lists(st.integers(0, len(called) - 1), min_size=2, max_size=8)
    rows = {"train": draw.draw(numbers), "test": draw.draw(numbers)}
    rows["train"][0] = len(called) - 1  # so that there are as many numbers as names
    expected = called  # by number
    if kind in TEXT:
        expected = sorted({called[row] for split in rows.values() for row in split})
    elif kind == pa.bool_():
        rows = {split: [row % 2 for row in given] for split, given in rows.items()}
        called = expected = ["False", "True"]
    folder = tmp_path_factory.mktemp("labels")
    for split, given_rows in rows.items():
        values: list[object] = [called[row] if kind in TEXT else row for row in given_rows]
        values = [bool(value) for value in values] if kind == pa.bool_() else values
        labels = column(pa.int64() if kind == "ClassLabel" else kind, values)
        table = pa.table({"image": pa.array([picture(row) for row in given_rows], image), "label": labels})
        if kind == "ClassLabel":
            kinds = {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=called)}
            table = table.replace_schema_metadata(datasets.Features(kinds).arrow_schema.metadata)
        if source != "hub" or {image, kind} & {*NOT_IN_DATASETS}:
            pq.write_table(table, folder / f"{split}.parquet")
        else:
            datasets.Dataset(table).save_to_disk(str(folder / split))
            (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    if source.startswith("own"):  # by name, whatever the numbers
        by_name = kind in TEXT or kind in ("ClassLabel", pa.bool_())
        known = called[::-1] if by_name else [str(number) for number in range(len(called))]
        flat = SIZES | {"partition.scheme": "own", "partition.min-size": 1, "model.num-classes": len(known)}
        config = Config.from_flat(flat | {"data.classes": "|".join(known), "data.path": str(folder)})
        at = "train" if source == "own" else "test"
        images = load_own(Place(str(folder)), config) if at == "train" else load_own_test(config.data, config.model)
        found = [known[label] for label in images.labels.tolist()]
        assert found == [called[row] if by_name else str(row) for row in rows[at]]
        assert images.pixels[:, 0, 0, 0].tolist() == rows[at]  # each label at its own picture
        return
    for split, given_rows in rows.items():
        opened = open_split(DataConfig(path=str(folder)), split)
        labels = given_rows if kind not in TEXT else [expected.index(called[row]) for row in given_rows]
        assert opened.labels.tolist() == labels
        assert opened.labels.dtype == np.int64
        assert opened.classes == (None if kind in (*WHOLE, *FLOATS) else tuple(expected))
    images = load(DataConfig(path=str(folder)), small(num_classes=len(expected))).train
    assert images.pixels[:, 0, 0, 0].tolist() == rows["train"]


def test_unusable_labels_are_refused_by_row_and_no_other_column_is_taken(tmp_path: Path) -> None:
    cases: list[tuple[object, str]] = [
        ([0.0, 0.5, 1.0], "row 1: label 0.5 is no whole number"),
        ([0.0, 1.0, float("nan")], r"row 2 has no label \(NaN\)"),
        ([0.0, float("inf"), 1.0], "row 1: label inf is no whole number"),
        (["a", " ", "b"], r"row 1 has no label \(empty text\)"),
        ([0, None, 1], "row 1 has no label"),
        (pa.array([0, 2**63 + 1, 1], pa.uint64()), "labels that cannot be read"),
        (pa.array([b"\xff"] * 3).cast(pa.string(), safe=False), "labels that are not UTF-8"),
        ([[0], [1], [0]], r"column 'NAMED' \(list<.*\) does not hold labels; set .*-column to one of: fold \(int64\)$"),
    ]
    for number, (labels, problem) in enumerate(cases):
        named = ("label", "Class", "TARGET")[number % 3]
        table = pa.table({"image": [picture()] * 3, named: labels, "fold": [0, 1, 0]})
        with pytest.raises(DataError, match=problem.replace("NAMED", named)):
            open_split(write_splits(tmp_path / str(number), table), "train")


def test_which_column_has_the_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = 12
    many = {"image": [picture(row) for row in range(rows)], "file": [f"{row}.png" for row in range(rows)]}
    kinds = {"species": ["b", "a"] * 6, "fold": [0, 1, 2] * 4, "weight": [0.5] * rows, "size": [2.0, 3.0, 2.0] * 4}
    several, none = "several columns with labels; .* one of: ", "no column with labels; none of its columns would do: "
    cases: list[tuple[str, str]] = [
        ("species", ""),  # text is no worse than numbers
        ("species weight", ""),
        ("species fold", rf"{several}species \(string\), fold \(int64\)$"),
        ("fold size", rf"{several}fold \(int64\), size \(double\)$"),
        ("weight", f"{none}image"),
        ("", rf"{none}.*file \(string\)"),
    ]
    for number, (columns, problem) in enumerate(cases):
        data = write_splits(tmp_path / str(number), pa.table(many | {name: kinds[name] for name in columns.split()}))
        if problem:
            with pytest.raises(DataError, match=problem):
                open_split(data, "train")
        else:
            assert open_split(data, "train").classes == ("a", "b")
            assert f"{data.path}/train.parquet: labels are read from the column 'species'" in caplog.text


def test_the_test_split_s_labels_are_in_train_s_column_and_of_its_kind(tmp_path: Path) -> None:
    for test, problem in (
        (
            a_table([0, 1]).rename_columns(["image", "fold"]),
            r"test\.parquet has no column 'label'; label them, or judge",
        ),
        (a_table(["a", "b"]), "labels are numbers here and text in the test split"),
    ):
        data = write_splits(tmp_path, a_table([0, 1, 1, 0]), test)
        with pytest.raises(DataError, match=problem):
            open_split(data, "test")


def test_text_classes_are_of_train_and_test_unless_the_test_is_not_read(tmp_path: Path) -> None:
    data = write_splits(tmp_path, a_table(["b", "d", "b"]), a_table(["c", "b"]))
    opened = [open_split(data, split) for split in ("train", "test")]
    assert [split.classes for split in opened] == [("b", "c", "d")] * 2
    assert [split.labels.tolist() for split in opened] == [[0, 2, 0], [1, 0]]
    assert open_split(DataConfig(path=str(tmp_path), validation=0.5), "train").classes == ("b", "d")


def test_a_test_split_without_labels_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, none in enumerate((-1, None, float("nan"))):
        folder = parquet(tmp_path / str(number), test="validation")
        pq.write_table(a_table([none] * 3), folder / "test.parquet")
        data = DataConfig(path=str(folder))
        assert load(data, small(num_classes=2)).test.labels.tolist() == [0, 1, 1, 0]
        line = "test.parquet has no labels: of 3 rows, none has one in 'label'; it is passed over, and"
        assert f"{line} {folder}/val" in caplog.text
        (folder / "validation.parquet").unlink()
        with pytest.raises(
            DataError, match=r"test\.parquet has no labels: .*; label them, or judge on a share .* data\.v"
        ):
            open_split(data, "test")


def test_labels_that_begin_at_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_splits(tmp_path, a_table([1, 2, 2]))
    with pytest.raises(DataError, match=r"labels begin at 1 \(1 to 2\), but classes are numbered from 0; subtract 1"):
        load(data, small(num_classes=2))
    with pytest.raises(DataError, match=r"labels begin at 1 \(1 to 2\)"):
        resolve(Config(data=data))
    pq.write_table(a_table([0, 1, 2**40]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="label 1099511627776 numbers no class"):
        resolve(Config(data=replace(data, test_limit=1)))  # another setting, so that nothing is remembered
    pq.write_table(a_table([1, 2, 2]), tmp_path / "train.parquet")
    assert load(data, small(num_classes=3)).classes == ("0", "1", "2")
    assert "labels begin at 1 (1 to 2), so class 0 has no image here" in caplog.text

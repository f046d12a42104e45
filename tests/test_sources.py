"""Every source to the same bytes and labels that its own library reads; every bad input refused by name."""

import importlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from test_decode import Pixels, encode
from test_layout import FEATURES, a_table, folders, picture, write_splits
from tiny import SIZES, small

from fedmitr_flwr.common.errors import DataError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config, DataConfig, ModelConfig
from fedmitr_flwr.data import decode, flower_datasets, sources
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.own import Place, load_own, load_own_test
from fedmitr_flwr.data.sources import load, open_split
from fedmitr_flwr.resolve import resolve

Log, Patch = pytest.LogCaptureFixture, pytest.MonkeyPatch
UNREADABLE = "not a readable image"
MODEL, DIGITS = small(8, 3, 2), small()
TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
WHOLE = (pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.dictionary(pa.int8(), pa.int64()))
FLOATS = (pa.float32(), pa.float64(), pa.decimal128(5, 1))
NOT_IN_DATASETS = (pa.string_view(), pa.binary_view())
NAME = st.text("abcXYZ é高", min_size=1, max_size=5).map(str.strip).filter(bool)


def pictures(total: int, *, seed: int = 0) -> list[Pixels]:
    return list(np.random.default_rng(seed).integers(0, 256, (total, 6, 8, 3), dtype=np.uint8))


def column(images: Iterable[Pixels | bytes | None]) -> list[dict[str, object]]:
    """Cells of a Hugging Face image column."""
    return [{"bytes": encode(one) if isinstance(one, np.ndarray) else one, "path": None} for one in images]


def write(file: Path, columns: dict[str, Any], features: datasets.Features | None = FEATURES) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=features and features.arrow_schema), file, row_group_size=3)


def at(source: str, path: Path | str, **choice: Any) -> DataConfig:
    return DataConfig(source=source, path=str(path), **choice)


parquet, image_folder, hub = (partial(at, source) for source in ("parquet", "imagefolder", "hub"))
LABELLED = {"image": column(pictures(4)), "label": [0, 1, 0, 1]}


def write_both(folder: Path, columns: dict[str, Any], features: datasets.Features | None = FEATURES) -> DataConfig:
    for name in ("train", "test"):
        write(folder / f"{name}.parquet", columns, features)
    return parquet(folder)


def chw(images: Iterable[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)


def drawn(total: int, limit: int, *names: object) -> torch.Tensor:
    """The rows that are chosen, from the stream of that name."""
    return torch.randperm(total, generator=stream(0, *names))[:limit].sort().values


def refusal(data: DataConfig, model: ModelConfig = MODEL) -> str:
    with pytest.raises(DataError) as caught:
        load(data, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(ours: Images, expected: Images) -> bool:
    return torch.equal(ours.pixels, expected.pixels) and torch.equal(ours.labels, expected.labels)


def with_labels(images: Images) -> list[list[int]]:
    """Every image as its pixels and its label, in an order that depends on nothing else."""
    return sorted(torch.cat([images.pixels.flatten(1).long(), images.labels[:, None]], dim=1).tolist())


def test_digits_are_scikit_learns_in_a_stratified_split() -> None:
    data, digits = load(DataConfig(), DIGITS), load_digits()
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, tuple("0123456789"))
    theirs = [[*(round(v * 255 / 16) for v in x), int(y)] for x, y in zip(digits.data, digits.target, strict=True)]
    assert sorted(with_labels(data.train) + with_labels(data.test)) == sorted(theirs)
    train, test = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.test))
    assert (test / (train + test) - 0.2).abs().max() < 0.01
    assert torch.equal(load(DataConfig(), small(8, 3)).test.pixels, data.test.pixels.repeat(1, 3, 1, 1))
    assert "model.in-chans = 4" in refusal(DataConfig(), small(8, 4))
    assert "set model.num-classes = 10" in refusal(DataConfig(), small(8, 1, 7))


def test_limits_are_drawn_once_from_their_own_stream() -> None:
    for share, test in ((0.0, "test"), (0.2, "validation")):
        whole = load(DataConfig(validation=share), DIGITS)
        limited = load(DataConfig(validation=share, train_limit=100, test_limit=7), DIGITS)
        train, judged = drawn(len(whole.train), 100, "limit", "train"), drawn(len(whole.test), 7, "limit", test)
        assert equal(limited.train, whole.train.subset(train))
        assert equal(limited.test, whole.test.subset(judged))
    wider = replace(DIGITS, width=128)  # a second load costs nothing
    assert load(DataConfig(validation=0.2), wider, with_test=False).train is whole.train


def test_a_share_of_each_class_of_the_training_images_is_set_aside() -> None:
    """At random; a larger share holds a smaller one."""
    everything, data = load(DataConfig(), DIGITS), load(DataConfig(validation=0.2), DIGITS)
    before = torch.bincount(everything.train.labels).tolist()
    assert torch.bincount(data.test.labels).tolist() == [round(0.2 * count) for count in before]
    assert with_labels(everything.train) == sorted(with_labels(data.train) + with_labels(data.test))
    labels = everything.train.labels.numpy()
    small, large = sources._aside(labels, 0.2), sources._aside(labels, 0.4)
    assert small.sum() < large.sum()
    assert not (small & ~large).any()
    rows = np.flatnonzero(labels == 3)
    wanted = rows[drawn(len(rows), round(0.2 * len(rows)), "validation", 3).numpy()]
    assert np.array_equal(np.flatnonzero(small & (labels == 3)), wanted)
    # round(0.9 · 4) would be all four of class 0, and 1 the only one of class 1.
    assert sources._aside(np.array([0, 1, 0, 0, 0]), 0.9).tolist().count(True) == 3
    none = "data.validation = 0.001 sets no image of any class aside; raise it"
    assert none in refusal(DataConfig(validation=0.001), DIGITS)


def test_a_test_split_that_is_not_needed_is_not_even_looked_for(tmp_path: Path) -> None:
    images, labels = pictures(10), [0, 1] * 5
    write(tmp_path / "train.parquet", {"image": column(images), "label": labels})
    data = load(parquet(tmp_path), MODEL, with_test=False)
    assert (len(data.train), len(data.test)) == (10, 0)
    assert "test*.parquet" in refusal(parquet(tmp_path))
    (tmp_path / "test.parquet").write_bytes(b"nobody reads this")
    data = load(parquet(tmp_path, validation=0.4), MODEL)
    assert sorted(data.test.labels.tolist()) == [0, 0, 1, 1]
    assert torch.equal(data.test.pixels, chw(images)[sources._aside(np.array(labels), 0.4)])
    assert "test.parquet" in refusal(parquet(tmp_path))


def test_only_the_images_within_the_limit_are_decoded_and_each_once(tmp_path: Path, monkeypatch: Patch) -> None:
    images, opened, decoded = pictures(20), decode.opened, []
    write_both(tmp_path, {"image": column(images), "label": [0, 1] * 10})
    monkeypatch.setattr(decode, "opened", lambda *image: (decoded.append(image[1]), opened(*image))[1])
    for _ in range(2):
        data = load(parquet(tmp_path, train_limit=6, test_limit=2), MODEL)
    assert len(decoded) == len(set(decoded)) == 8
    assert torch.equal(data.train.pixels, chw(images)[drawn(20, 6, "limit", "train")])


def test_shards_are_read_in_order_also_from_a_data_folder(tmp_path: Path) -> None:
    images, labels = pictures(10), [0, 1, 1, 1, 0, 0, 0, 1, 0, 1]
    for shard, rows in enumerate((slice(0, 4), slice(4, 10))):
        part = {"image": column(images[rows]), "label": labels[rows]}
        write(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", part)
    write(tmp_path / "data" / "validation.parquet", {"image": column(images[:1]), "label": [1]})
    write(tmp_path / "data" / "train_small.parquet", {"image": column(images[:2]), "label": [0, 1]})  # a copy
    data = load(parquet(tmp_path), MODEL)
    assert equal(data.train, Images(chw(images), torch.tensor(labels)))
    assert data.test.labels.tolist() == [1]


def test_missing_and_corrupt_parquet_files_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "gone") in refusal(parquet(tmp_path / "gone"))
    assert "train*.parquet" in refusal(parquet(tmp_path))
    assert "no images" in refusal(write_both(tmp_path / "empty", {"image": [], "label": []}))
    data = write_both(tmp_path, LABELLED)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:-200])
    assert "train.parquet is not a readable Parquet file" in refusal(data)
    second = tmp_path / "shards" / "train-00001-of-00002.parquet"
    write(tmp_path / "shards" / "train-00000-of-00002.parquet", LABELLED)
    write(second, {"image": column([*pictures(1), b"x"]), "label": [0, 1]})
    assert f"{second} row 1: {UNREADABLE}" in refusal(parquet(tmp_path / "shards"))
    write(second, {"image": column(pictures(1))}, features=None)
    assert f"{second} has other columns" in refusal(parquet(tmp_path / "shards"))
    dds = b"DDS " + struct.pack("<I", 124) + bytes(120)  # of this one Pillow says so by a NotImplementedError
    data = write_both(tmp_path / "dds", {"image": column([dds]), "label": [0]})
    with pytest.raises(DataError, match=f"train.parquet row 0: {UNREADABLE}"):
        resolve(Config(data=data))  # before anything starts


def test_of_two_image_columns_the_typed_or_configured_one_is_read_and_cells_may_name_a_file(tmp_path: Path) -> None:
    front, back = pictures(2), pictures(2, seed=1)
    data = write_both(tmp_path, {"front": column(front), "back": column(back), "label": [0, 1]}, features=None)
    problem = "several columns with encoded images; set data.image-column to one of: front (struct), back (struct)"
    assert problem in refusal(data)
    assert torch.equal(load(parquet(tmp_path, image_column="back"), MODEL).train.pixels, chw(back))
    features = datasets.Features({**FEATURES, "thumbnail": datasets.Value("binary")})
    columns = {"image": column(front), "label": [0, 1], "thumbnail": [b"", b""]}
    assert torch.equal(load(write_both(tmp_path / "b", columns, features), MODEL).train.pixels, chw(front))
    (tmp_path / "a.png").write_bytes(encode(front[0]))
    data = write_both(tmp_path, {"image": [{"bytes": None, "path": "a.png"}], "label": [1]})
    assert torch.equal(load(data, MODEL).train.pixels, chw(front[:1]))
    data = write_both(tmp_path / "c", {"image": [{"bytes": None, "path": "gone.png"}], "label": [1]})
    assert f"row 0: the image file {tmp_path}/c/gone.png cannot be read" in refusal(data)


def test_columns_and_rows_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """And where labels are unusable, no other column is taken."""
    one, ab = column(pictures(1)), {"image": column(pictures(2)), "a": [0, 1], "b": [0, 1]}
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        (ab, {"label_column": "gone"}, "no column 'gone'; set data.label-column to one of: a (int64), b (int64)"),
        (ab, {"image_column": "a"}, "'a' (int64) does not hold encoded images; set data.image-column to one of: image"),
        (ab, {"label_column": "image"}, "'image' (struct) does not hold labels; set data.label-column to one of: a"),
        ({"pixels": [[1, 2]], "label": [0]}, {}, "no column with encoded images; none of its columns would do: pixels"),
        (LABELLED | {"label": [0, 1, 2, 0]}, {}, "row 2: label 2 is outside 0..1; set model.num-classes = 3"),
        (LABELLED | {"label": [0, -1, 0, 0]}, {}, "row 1: label -1 is outside 0..1; remove the rows without a label"),
        ({"image": [*one, *column([None])], "label": [0, 1]}, {}, "train.parquet row 1 has no image"),
    ]
    unusable: list[tuple[object, str]] = [
        ([0.0, 0.5, 1.0], "row 1: label 0.5 is no whole number"),
        ([0.0, 1.0, float("nan")], "row 2 has no label (NaN)"),
        ([0.0, float("inf"), 1.0], "row 1: label inf is no whole number"),
        (["a", " ", "b"], "row 1 has no label (empty text)"),
        ([0, None, 1], "row 1 has no label"),
        (pa.array([0, 2**63 + 1, 1], pa.uint64()), "labels that cannot be read"),
        (pa.array([b"\xff"] * 3).cast(pa.string(), safe=False), "labels that are not UTF-8"),
        ([[0], [1], [0]], "does not hold labels; set data.label-column to one of: fold (int64)"),
    ]
    for name, (labels, problem) in zip(("label", "Class", "TARGET") * 3, unusable, strict=False):
        cases.append(({"image": [picture()] * 3, name: labels, "fold": [0, 1, 0]}, {}, problem))
    for number, (columns, choice, named) in enumerate(cases):
        write_both(tmp_path / str(number), columns, features=None)
        assert named in refusal(parquet(tmp_path / str(number), **choice))


def test_class_names_must_agree_with_the_model_and_the_test_split(tmp_path: Path) -> None:
    data = write_both(tmp_path, LABELLED)
    assert "2 classes, but model.num-classes = 5; set model.num-classes = 2" in refusal(data, small(8, 3, 5))
    swapped = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    write(tmp_path / "test.parquet", LABELLED, swapped)
    assert "class 'cat' of the train split is 'dog' in the test split" in refusal(data)
    write(tmp_path / "test.parquet", LABELLED, features=None)
    assert load(data, MODEL).classes == ("cat", "dog")


def test_an_image_folder_sorts_its_classes_by_name_and_names_its_files(tmp_path: Path) -> None:
    data = load(image_folder(folders(tmp_path, number=3)), small(8, 1, 2))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    shutil.copytree(tmp_path / "train" / "dog", tmp_path / "train" / "emu")
    assert "emu/0.png: label 2 is outside 0..1; set model.num-classes = 3" in refusal(image_folder(tmp_path))
    broken = tmp_path / "train" / "dog" / "9.png"
    broken.write_bytes(b"x")
    assert f"{broken}: {UNREADABLE}" in refusal(image_folder(tmp_path), small(8, 3, 3))
    for gone, made, named in (
        ("test", "spare", "has no folder test/"),
        ("test/dog", "test/emu", "the class 'emu' is not in"),
        ("train/dog", "train/emu", "emu: no image files"),
        ("train", "train", "train: no class folders"),
    ):
        folder = folders(tmp_path / named.replace("/", ""))
        shutil.rmtree(folder / gone)
        (folder / made).mkdir()
        assert named in refusal(image_folder(folder))


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write one to; the library's prepared copies stay in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "data-set"


def test_the_hub_path_reads_a_local_folder_as_the_parquet_path_does(data_set: Path) -> None:
    expected = load(write_both(data_set, {"image": column(pictures(6)), "label": [0, 1, 1, 0, 1, 0]}), MODEL)
    for limit in (0, 4):
        data = load(hub(data_set, train_limit=limit), MODEL)
        assert data.classes == ("cat", "dog")
        assert torch.equal(data.test.pixels, expected.test.pixels)
        assert equal(data.train, expected.train.subset(torch.from_numpy(sources.kept(6, limit, "train"))))


def test_a_data_set_saved_to_disk_is_loaded_by_hub_and_refused_elsewhere(data_set: Path) -> None:
    images = pictures(4)
    one = datasets.Dataset.from_dict({"image": column(images), "label": [0, 1, 1, 0]}, features=FEATURES)
    datasets.DatasetDict(train=one, validation=one.select([3])).save_to_disk(str(data_set))
    data = load(hub(data_set), MODEL)
    assert torch.equal(data.train.pixels, chw(images))
    assert torch.equal(data.test.pixels, chw(images[3:]))
    one.save_to_disk(str(data_set / "one"))
    assert "saved without splits" in refusal(hub(data_set / "one"))
    for config in (parquet(data_set), image_folder(data_set), parquet(data_set / "one")):
        assert "save_to_disk; set data.source = 'hub'" in refusal(config)


def test_what_is_wrong_with_a_hub_data_set_is_one_line(data_set: Path) -> None:
    message = refusal(hub("nobody/no-such-data-set"))  # conftest switches the Hub off
    assert re.search("'nobody/no-such-data-set'.*check the name and the network", message)
    write_both(data_set, {"image": column([*pictures(2), b"x"]), "label": [0, 1, 0]})
    assert f"split 'train', row 2: {UNREADABLE}" in refusal(hub(data_set))
    write(data_set / "alone" / "train.parquet", {"image": column(pictures(2)), "label": [0, 1]})
    assert "has no split 'test' (or testing, " in refusal(hub(data_set / "alone"))


def test_telemetry_is_off_unless_asked_for_and_plots_are_not_imported(monkeypatch: Patch) -> None:
    for before, after in (("1", "1"), ("0", "0"), (None, "0")):
        monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", before or "")
        if before is None:
            monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
        importlib.reload(flower_datasets)
        assert os.environ["FLWR_TELEMETRY_ENABLED"] == after
    assert flower_datasets.ImportedLater("json").loads("[3]") == [3]
    code = "import sys, fedmitr_flwr.data.flower_datasets; sys.exit('seaborn' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "shape", "form", "last"),
    [("fashion_mnist", (1, 28, 28), "PNG", "Ankle boot"), ("cifar10", (3, 32, 32), "WEBP", "truck")],
)
def test_real_data_byte_by_byte(shared: Path, name: str, shape: tuple[int, int, int], form: str, last: str) -> None:
    folder = shared / "data" / name
    data = load(parquet(folder, train_limit=50, test_limit=20), small(shape[1], shape[0]))
    assert data.train.pixels.shape == (50, *shape)
    assert data.classes[9] == last
    table = pq.read_table(folder / "test.parquet")
    for i, row in enumerate(drawn(10_000, 20, "limit", "test").tolist()):
        with Image.open(io.BytesIO(table.column("image")[row].as_py()["bytes"])) as image:
            assert image.format == form
            assert data.test.pixels[i].permute(1, 2, 0).numpy().tobytes() == image.tobytes()
        assert data.test.labels[i] == table.column("label")[row].as_py()


@settings(derandomize=True, max_examples=40)
@given(st.data())
def test_labels_of_every_type_in_every_source(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*TEXT, *WHOLE, *FLOATS, pa.bool_(), "ClassLabel"]))
    source = data.draw(st.sampled_from(["parquet", "hub", "own", "own test"]))
    called = data.draw(st.lists(NAME, min_size=2, max_size=4, unique=True))
    image = data.draw(st.sampled_from([pa.binary(), pa.large_binary(), pa.binary_view()]))
    numbers = st.lists(st.integers(0, len(called) - 1), min_size=2, max_size=8)
    rows = {split: data.draw(numbers) for split in ("train", "test")}
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
        stored = pa.int64() if kind == "ClassLabel" else kind
        labels = pa.array(values, getattr(stored, "value_type", stored))
        if pa.types.is_dictionary(stored):
            labels = labels.dictionary_encode().cast(stored)
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


def test_which_column_has_the_labels(tmp_path: Path, caplog: Log) -> None:
    """The one that is configured, a ClassLabel, one of such a name, or the only one that can be."""
    typed = {"image": datasets.Image(), "label": datasets.Value("int64"), "kind": datasets.ClassLabel(2)}
    for wrong, right, configured, known in (
        ("index", "label", "", None),
        ("coarse_label", "fine_label", "", None),
        ("label", "kind", "kind", None),
        ("label", "kind", "", datasets.Features(typed)),
    ):
        folder = tmp_path / f"{wrong} {right} {configured}"
        write_both(folder, {"image": column(pictures(2)), wrong: [1, 1], right: [1, 0]}, known)
        assert load(parquet(folder, label_column=configured), MODEL).train.labels.tolist() == [1, 0]
    many = {"image": [picture(row) for row in range(12)], "file": [f"{row}.png" for row in range(12)]}
    kinds = {"species": ["b", "a"] * 6, "fold": [0, 1, 2] * 4, "weight": [0.5] * 12, "size": [2.0, 3.0, 2.0] * 4}
    several, none = "several columns with labels", "no column with labels; none of its columns would do: "
    for columns, problem in {
        "species": "",  # text is no worse than numbers
        "species weight": "",
        "species fold": f"{several}; set data.label-column to one of: species (string), fold (int64)",
        "fold size": f"{several}; set data.label-column to one of: fold (int64), size (double)",
        "weight": f"{none}image",
        "": none,
    }.items():
        data = write_splits(tmp_path / f"{columns}.", pa.table(many | {name: kinds[name] for name in columns.split()}))
        if problem:
            assert problem in refusal(data)
        else:
            assert open_split(data, "train").classes == ("a", "b")
            assert f"{data.path}/train.parquet: labels are read from the column 'species'" in caplog.text


def test_a_test_split_s_labels_are_in_train_s_column_and_of_its_kind_or_none(tmp_path: Path, caplog: Log) -> None:
    """Text classes are of train and test, unless the test is not read; a test split without labels is passed over."""
    other = a_table([0, 1]).rename_columns(["image", "fold"])
    for test, problem in (
        (other, "test.parquet has no column 'label'; label them, or judge"),
        (a_table(["a", "b"]), "labels are numbers here and text in the test split"),
    ):
        data = write_splits(tmp_path, a_table([0, 1, 1, 0]), test)
        with pytest.raises(DataError, match=problem):
            open_split(data, "test")
    data = write_splits(tmp_path, a_table(["b", "d", "b"]), a_table(["c", "b"]))
    opened = [open_split(data, split) for split in ("train", "test")]
    assert [split.classes for split in opened] == [("b", "c", "d")] * 2
    assert [split.labels.tolist() for split in opened] == [[0, 2, 0], [1, 0]]
    assert open_split(DataConfig(path=str(tmp_path), validation=0.5), "train").classes == ("b", "d")
    for number, none in enumerate((-1, None, float("nan"))):
        folder = tmp_path / str(number)
        data = write_splits(folder, a_table([0, 1, 1, 0]))
        (folder / "test.parquet").rename(folder / "validation.parquet")
        pq.write_table(a_table([none] * 3), folder / "test.parquet")
        assert load(data, MODEL).test.labels.tolist() == [0, 1, 1, 0]
        line = "test.parquet has no labels: of 3 rows, none has one in 'label'; it is passed over, and"
        assert f"{line} {folder}/val" in caplog.text
        (folder / "validation.parquet").unlink()
        with pytest.raises(DataError, match=r"test\.parquet has no labels: .*; label them, or judge on a share"):
            open_split(data, "test")


def test_labels_that_begin_at_1(tmp_path: Path, caplog: Log) -> None:
    data = write_splits(tmp_path, a_table([1, 2, 2]))
    assert "labels begin at 1 (1 to 2), but classes are numbered from 0; subtract 1" in refusal(data)
    with pytest.raises(DataError, match=r"labels begin at 1 \(1 to 2\)"):
        resolve(Config(data=data))
    pq.write_table(a_table([0, 1, 2**40]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="label 1099511627776 numbers no class"):
        resolve(Config(data=replace(data, test_limit=1)))  # another setting, so that nothing is remembered
    pq.write_table(a_table([1, 2, 2]), tmp_path / "train.parquet")
    assert load(data, small(8, 3, 3)).classes == ("0", "1", "2")
    assert "labels begin at 1 (1 to 2), so class 0 has no image here" in caplog.text

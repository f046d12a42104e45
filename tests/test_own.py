"""A client's own folder: classes are found by name, and what is the client's own affair stays in its log."""

import errno
import logging
import os
import re
import tracemalloc
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import SIZES

from deploy.demo_data import as_folders, as_parquet
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, DataError
from fedmitr_flwr.config import Config
from fedmitr_flwr.data import own
from fedmitr_flwr.data.images import DataSet, Images
from fedmitr_flwr.data.own import Place, load_own, load_own_test, look_at_own, named_classes

NAMES = ("top", "middle", "bottom")
FOUR = torch.arange(4)


def settings(names: tuple[str, ...] = NAMES, **changes: object) -> Config:
    flat = SIZES | {"partition.scheme": "own", "model.num-classes": len(names), "data.classes": "|".join(names)}
    return Config.from_flat(flat | changes)


def place(path: Path) -> Place:
    return Place(str(path))


def bag(images: Images) -> list[tuple[bytes, int]]:
    """Images with their labels, in no order."""
    return sorted(zip(map(bytes, images.pixels.numpy()), images.labels.tolist(), strict=True))


def refusal(where: Place, config: Config) -> str:
    """What the server is told, whether the images are loaded or only looked at."""
    told = set()
    for look in (load_own, look_at_own):
        with pytest.raises(DataError) as caught:
            look(where, config)
        told.add(str(caught.value))
    (message,) = told
    return message


def test_class_folders_have_the_server_s_labels(tmp_path: Path, tiny: DataSet) -> None:
    """Some file systems write an accent as a letter of its own."""
    accents = ("café", "thé", "eau")
    apart = tuple(unicodedata.normalize("NFD", name) for name in accents)
    mixed = ("bottom", "top", "middle")
    for inside, written, names in (("a/train", NAMES, NAMES), ("b", NAMES, mixed), ("c", apart, accents)):
        as_folders(tmp_path / inside, tiny.train, written)
        to_server = torch.tensor([names.index(unicodedata.normalize("NFC", name)) for name in written])
        expected = Images(tiny.train.pixels, to_server[tiny.train.labels])
        assert bag(load_own(place(tmp_path / inside[0]), settings(names))) == bag(expected)


def test_numbers_are_names_only_of_numerals(tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    as_parquet(tmp_path, tiny.train, "201", "number")
    found = load_own(place(tmp_path), settings(("0", "1", "2")))
    assert torch.equal(found.labels, torch.tensor([2, 0, 1])[tiny.train.labels])
    assert refusal(place(tmp_path), settings()).startswith("3 of this client's classes are unknown")
    assert "the labels here are numbers: store their names" in caplog.text


def test_a_client_may_lack_classes(tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    """Without a folder, or with one that is empty but for what a file browser leaves; a cache is no class."""
    as_folders(tmp_path, tiny.train.subset((tiny.train.labels == 1).nonzero().flatten()), NAMES)
    for file in ("top/.DS_Store", ".cache/index.db"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(b"x")
    with caplog.at_level(logging.INFO, "fedmitr"):
        look_at_own(place(tmp_path), settings())
    assert "own images: 20 of 1 classes: 'middle' 20" in caplog.text
    assert "classes without images here: 'top', 'bottom'" in caplog.text
    assert set(load_own(place(tmp_path), settings()).labels.tolist()) == {1}


def test_an_unknown_class_is_named_in_the_log(tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    """The client's, and there only; it is refused."""
    as_folders(tmp_path, tiny.train, ("Top", "middle", "ward 7"))
    told = refusal(place(tmp_path), settings())
    assert told.startswith("2 of this client's classes are unknown to the server (data.classes)")
    assert not any(word in told for word in ("Top", "ward", str(tmp_path)))
    assert "40 images of classes that the server does not know: 'Top' (like 'top'?), 'ward 7'" in caplog.text
    assert "its classes: 'top', 'middle', 'bottom'; rename them" in caplog.text
    found = load_own(place(tmp_path), settings(**{"data.unknown-classes": "skip"}))
    assert bag(found) == bag(tiny.train.subset((tiny.train.labels == 1).nonzero().flatten()))
    assert "they are left out" in caplog.text
    with patch.object(own, "SHOWN", 1):
        assert refusal(place(tmp_path), settings()) == told
    assert "does not know: 'Top' (like 'top'?) and 1 more; its classes" in caplog.text


def test_a_test_split_is_not_read_and_a_folder_of_parquet_files_is_no_class(tmp_path: Path, tiny: DataSet) -> None:
    as_parquet(tmp_path / "data", tiny.train, NAMES, file="mine.parquet")
    as_parquet(tmp_path / "data", tiny.test, NAMES, file="test.parquet")
    assert len(load_own(place(tmp_path), settings())) == len(tiny.train)


def test_columns_are_the_node_s_or_else_the_server_s(tmp_path: Path, tiny: DataSet) -> None:
    table = pq.read_table(as_parquet(tmp_path, tiny.train, NAMES, "text") / "train.parquet")
    table = table.append_column("site", pa.array(["x"] * 60))
    pq.write_table(table, tmp_path / "train.parquet")
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(table.rename_columns(["view", "finding", "site"]), other / "all.parquet")
    config = settings(**{"data.label-column": "label"})
    for where in (place(tmp_path), Place(str(other), label_column="finding")):
        assert torch.equal(load_own(where, config).labels, tiny.train.labels)


def relabelled(folder: Path, images: Images, first: object, rest: object, name: str = "label") -> Path:
    """A table whose first row has one label and all others another, beside a column of patients."""
    table = pq.read_table(as_parquet(folder, images, NAMES, "text") / "train.parquet").drop_columns("label")
    columns = {name: [first] + [rest] * (len(table) - 1), "patient": ["Ann"] * len(table)}
    for each, values in columns.items():
        table = table.append_column(each, pa.array(values))
    pq.write_table(table, folder / "train.parquet")
    return folder


def both(folder: Path, images: Images) -> Path:
    return as_parquet(as_folders(folder, images, NAMES), images, NAMES)


def dicoms(folder: Path, images: Images) -> Path:
    """One class in a format that is not read."""
    for file in (as_folders(folder, images, NAMES) / "middle").iterdir():
        file.rename(file.with_suffix(".dcm"))
    return folder


@pytest.mark.parametrize(
    ("make", "told", "logged"),
    [
        (lambda folder, _: folder / "nowhere", "this client's data-path is no folder", "there is no folder"),
        (lambda folder, _: folder, "cannot be read", r"neither \*.parquet nor folders of images"),
        (lambda at, of: as_folders(at, of.subset(FOUR), NAMES), "has 4 images, and partition.min-size = 10", ""),
        (both, "cannot be read", "Parquet files and folders of images; keep one"),
        (lambda *of: relabelled(*of, -1, 0), "cannot be read", "train.parquet row 0: label -1 has no name"),
        (lambda *of: relabelled(*of, "x", "y", "ward"), "cannot be read", r"several .*: ward \(string\), patient"),
        (lambda *of: relabelled(*of, None, "top"), "cannot be read", "row 0 has no label"),
        (dicoms, "cannot be read", r"/middle has 20 files, and none is an image .*\.dcm 20\); convert them"),
    ],
)
def test_bad_folders_are_told_in_general_and_explained_in_the_log(
    tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture, make: Callable[..., Path], told: str, logged: str
) -> None:
    message = refusal(place(make(tmp_path, tiny.train)), settings())
    assert told in message
    assert not any(word in message for word in ("patient", "ward", "row", tmp_path.name))
    assert re.search(logged, caplog.text)


def test_who_cannot_list_a_folder_is_told(tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    """It is no absent class. Said by the operating system, since root, who may run the tests, can list everything."""
    as_folders(tmp_path, tiny.train, NAMES)
    (tmp_path / "middle" / "2024").mkdir()

    def listed(real: Callable[..., object], path: str | Path) -> object:
        if Path(path) == tmp_path / closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    for closed in ("", "middle", "middle/2024"):
        with patch.multiple(os, **{name: partial(listed, getattr(os, name)) for name in ("scandir", "listdir")}):
            told = refusal(place(tmp_path), settings())
        assert told.startswith("this client's images cannot be read")
        assert str(tmp_path) not in told
        assert f"Permission denied: '{tmp_path / closed}'; let the user that runs the SuperNode read all" in caplog.text


def test_large_numbers_cost_nothing_many_fail(tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    """Dates, say: named up to the largest they would be gigabytes."""
    dates = ("20240101", "20240102", "20240103")
    where = place(as_parquet(tmp_path, tiny.train, dates, "number"))
    tracemalloc.start()
    assert refusal(where, settings()).startswith("3 of this client's classes are unknown")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert "does not know: '20240101', '20240102', '20240103'; its classes" in caplog.text
    with patch.object(own, "MOST_NUMBERS", 2):
        look_at_own(where, settings(dates))  # as many as there are classes
        assert "cannot be read" in refusal(where, settings(dates[:2]))
    assert f"{tmp_path}: the label column has 3 different numbers, which are no classes; name another" in caplog.text


def test_a_broken_image_is_told_in_general(tmp_path: Path, tiny: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    as_folders(tmp_path, tiny.train, NAMES)
    (tmp_path / "top" / "ann lee.png").write_bytes(b"no picture")
    look_at_own(place(tmp_path), settings())  # it does not decode
    with pytest.raises(DataError, match="cannot be read; the client's own log says which") as caught:
        load_own(place(tmp_path), settings())
    assert "ann lee" not in str(caught.value)
    assert "ann lee.png: not a readable image" in caplog.text


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model.num-classes": 10}, tuple("0123456789")),  # scikit-learn's digits
        ({"model.num-classes": 10, "evaluate.where": "clients"}, tuple("0123456789")),
        ({"model.num-classes": 3, "evaluate.where": "clients", "data.classes": "a | b | c"}, ("a", "b", "c")),
        ({"model.num-classes": 2, "data.classes": "cat | dog"}, ("cat", "dog")),
        ({"model.num-classes": 3, "evaluate.where": "clients"}, None),
        ({"data.source": "imagefolder", "data.path": "/nowhere", "evaluate.where": "clients"}, None),
    ],
)
def test_where_the_names_come_from(changes: dict[str, object], names: tuple[str, ...] | None) -> None:
    config = Config.from_flat({"partition.scheme": "own", "model.num-classes": 10, **changes})
    if names is None:
        told = r"data\.classes is empty, but with evaluate\.where = 'clients' .*; set it to"
        with pytest.raises(ConfigError, match=told):
            named_classes(config)
    else:
        assert named_classes(config).data.class_names == names
        assert named_classes(named_classes(config)) == named_classes(config)


@pytest.mark.parametrize("source", ["imagefolder", "parquet"])
def test_the_server_needs_no_train_split(tmp_path: Path, tiny: DataSet, source: str) -> None:
    if source == "parquet":
        as_parquet(tmp_path, tiny.test, NAMES, file="test.parquet")
    else:
        as_folders(tmp_path / "test", tiny.test, NAMES)
    flat = {"partition.scheme": "own", "model.num-classes": 3, "data.source": source, "data.path": str(tmp_path)}
    config = named_classes(Config.from_flat(SIZES | flat))
    assert set(config.data.class_names) == set(NAMES)
    found = load_own_test(config.data, config.model)
    by_name = [NAMES.index(config.data.class_names[label]) for label in found.labels.tolist()]
    assert bag(Images(found.pixels, torch.tensor(by_name))) == bag(tiny.test)
    few = Config.from_flat({"data.test-limit": 7}, base=config)
    assert len(load_own_test(few.data, few.model)) == 7


def test_a_test_set_of_other_classes_is_refused_with_all_details(tmp_path: Path, tiny: DataSet) -> None:
    as_folders(tmp_path / "test", tiny.test, NAMES)
    as_folders(tmp_path / "bad" / "test", tiny.test, ("a|b", "c", "d"))
    flat = SIZES | {"partition.scheme": "own", "data.source": "imagefolder", "data.path": str(tmp_path)}
    with pytest.raises(DataError, match=r"are of 3 classes, but model\.num-classes = 10"):
        named_classes(Config.from_flat(flat | {"model.num-classes": 10}))
    with pytest.raises(DataError, match=r"the class name 'a\|b' has a \| or a blank"):
        named_classes(Config.from_flat(flat | {"model.num-classes": 3, "data.path": str(tmp_path / "bad")}))
    named = Config.from_flat(flat | {"model.num-classes": 2, "data.classes": "top | middle"})
    told = rf"{tmp_path}, test split: 10 images .* does not know: 'bottom'; its .* data.unknown-classes = 'skip'"
    with pytest.raises(DataError, match=told):
        load_own_test(named.data, named.model)
    skipping = Config.from_flat({"data.unknown-classes": "skip", "out-dir": str(tmp_path / "out")}, base=named)
    assert len(load_own_test(skipping.data, skipping.model)) == 20
    with pytest.raises(DataError, match=r"none of the 30 images is of a class of data\.classes \(left, right\)"):
        pipeline.created(Config.from_flat({"data.classes": "left | right"}, base=skipping), "run")
    assert not (tmp_path / "out").exists()


def test_an_image_is_decoded_once_per_process(tmp_path: Path, tiny: DataSet) -> None:
    as_folders(tmp_path, tiny.train, NAMES)
    with patch.object(own, "decode", wraps=own.decode) as decode:
        for seed in range(3):
            load_own(place(tmp_path), settings(seed=seed))
    assert [len(call.args[1]) for call in decode.call_args_list] == [60]

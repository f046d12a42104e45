"""Every source to the same bytes that its own library reads; every bad input refused by name."""

import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from fedmitr_flwr.common.errors import DataError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import DataConfig, ModelConfig
from fedmitr_flwr.data import decode, flower_datasets, sources
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.sources import load

Pixels = NDArray[np.uint8]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
UNREADABLE = "not a readable image"


def model(num_classes: int = 2, in_chans: int = 3, img_size: int = 8) -> ModelConfig:
    return ModelConfig(num_classes=num_classes, in_chans=in_chans, img_size=img_size)


def pictures(total: int, *, height: int = 6, width: int = 8, seed: int = 0) -> list[Pixels]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (total, height, width, 3), dtype=np.uint8))


def encode(pixels: Pixels, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def column(images: Iterable[Pixels | bytes | None]) -> list[dict[str, object]]:
    """Cells of a Hugging Face image column."""
    return [{"bytes": encode(one) if isinstance(one, np.ndarray) else one, "path": None} for one in images]


def write(file: Path, columns: dict[str, Any], features: datasets.Features | None = FEATURES) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns, schema=features.arrow_schema) if features else pa.table(columns)
    pq.write_table(table, file, row_group_size=3)


def parquet(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="parquet", path=str(folder), **settings)


def write_both(folder: Path, columns: dict[str, Any], features: datasets.Features | None = FEATURES) -> DataConfig:
    for name in ("train", "test"):
        write(folder / f"{name}.parquet", columns, features)
    return parquet(folder)


def chw(images: Iterable[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)


def refusal(data: DataConfig, shape: ModelConfig | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(data, shape or model())
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- digits


def test_digits_are_scikit_learns_values() -> None:
    data, digits = load(DataConfig(), model(10, 1)), load_digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    ours = torch.cat([data.train.pixels, data.test.pixels]).flatten(1)
    labelled = torch.cat([ours.long(), torch.cat([data.train.labels, data.test.labels])[:, None]], dim=1)
    theirs = [[*(round(v * 255 / 16) for v in x), int(y)] for x, y in zip(digits.data, digits.target, strict=True)]
    assert sorted(labelled.tolist()) == sorted(theirs)


def test_the_digits_split_is_stratified() -> None:
    data = load(DataConfig(), model(10, 1))
    train, test = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.test))
    assert (test / (train + test) - 0.2).abs().max() < 0.01


def test_grey_is_repeated_for_a_colour_model() -> None:
    grey, colour = load(DataConfig(), model(10, 1)), load(DataConfig(), model(10, 3))
    assert torch.equal(colour.test.pixels, grey.test.pixels.repeat(1, 3, 1, 1))


def test_limits_are_drawn_once_from_their_own_stream() -> None:
    everything = load(DataConfig(), model(10, 1))
    limited = load(DataConfig(train_limit=100, test_limit=7), model(10, 1))
    rows = torch.randperm(1437, generator=stream(0, "limit", "train"))[:100].sort().values
    assert torch.equal(limited.train.pixels, everything.train.pixels[rows])
    assert torch.equal(limited.train.labels, everything.train.labels[rows])
    assert len(limited.test) == 7
    assert len(load(DataConfig(train_limit=5000), model(10, 1)).train) == 1437


def test_a_second_load_costs_nothing_whatever_the_rest_of_the_model() -> None:
    first = load(DataConfig(), model(10, 1))
    again = load(DataConfig(), ModelConfig(num_classes=10, in_chans=1, img_size=8, width=128))
    assert again.train is first.train
    assert load(DataConfig(), model(10, 1), with_test=False).train is first.train


def test_without_the_test_split_it_is_not_even_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"image": column(pictures(4)), "label": [0, 1, 0, 1]})
    data = load(parquet(tmp_path), model(), with_test=False)
    assert (len(data.train), len(data.test)) == (4, 0)
    assert data.test.pixels.shape[1:] == data.train.pixels.shape[1:]
    assert "test*.parquet" in refusal(parquet(tmp_path))


# --- the validation split


def with_labels(images: Images) -> list[list[int]]:
    """Every image as its pixels and its label, in an order that depends on nothing else."""
    return sorted(torch.cat([images.pixels.flatten(1).long(), images.labels[:, None]], dim=1).tolist())


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_share_of_each_class_of_the_training_images_is_set_aside(share: float) -> None:
    everything = load(DataConfig(), model(10, 1))
    data = load(DataConfig(validation=share), model(10, 1))
    before = torch.bincount(everything.train.labels).tolist()
    assert torch.bincount(data.test.labels).tolist() == [round(share * count) for count in before]
    assert with_labels(everything.train) == sorted(with_labels(data.train) + with_labels(data.test))
    assert data.classes == everything.classes


def test_what_is_set_aside_is_random_and_a_larger_share_holds_a_smaller_one() -> None:
    labels = load(DataConfig(), model(10, 1)).train.labels.numpy()
    small, large = sources._aside(labels, 0.2), sources._aside(labels, 0.4)
    assert small.sum() < large.sum()
    assert not (small & ~large).any()
    rows = np.flatnonzero(labels == 3)
    drawn = torch.randperm(len(rows), generator=stream(0, "validation", 3))[: round(0.2 * len(rows))]
    assert np.array_equal(np.flatnonzero(small & (labels == 3)), rows[drawn.sort().values.numpy()])


def test_a_class_keeps_its_last_image() -> None:
    aside = sources._aside(np.array([0, 1, 0, 0, 0]), 0.9)
    assert aside.tolist().count(True) == 3  # round(0.9 · 4) would be all four of class 0
    assert not aside[1]


def test_the_limits_are_of_what_is_left_and_of_what_is_set_aside() -> None:
    whole = load(DataConfig(validation=0.2), model(10, 1))
    data = load(DataConfig(validation=0.2, train_limit=100, test_limit=7), model(10, 1))
    kept = torch.randperm(len(whole.train), generator=stream(0, "limit", "train"))[:100].sort().values
    assert torch.equal(data.train.pixels, whole.train.pixels[kept])
    kept = torch.randperm(len(whole.test), generator=stream(0, "limit", "validation"))[:7].sort().values
    assert torch.equal(data.test.pixels, whole.test.pixels[kept])


def test_with_a_validation_split_the_test_images_are_not_read(tmp_path: Path) -> None:
    images = pictures(10)
    write(tmp_path / "train.parquet", {"image": column(images), "label": [0, 1] * 5})
    (tmp_path / "test.parquet").write_bytes(b"nobody reads this")
    data = load(parquet(tmp_path, validation=0.4), model())
    assert sorted(data.test.labels.tolist()) == [0, 0, 1, 1]
    rows = np.flatnonzero(sources._aside(np.array([0, 1] * 5), 0.4))
    assert torch.equal(data.test.pixels, chw(images)[rows])
    assert "test.parquet" in refusal(parquet(tmp_path))


def test_shares_do_not_share_a_cache() -> None:
    first, second = (load(DataConfig(validation=share), model(10, 1)) for share in (0.2, 0.3))
    assert len(first.test) < len(second.test)
    assert len(load(DataConfig(), model(10, 1)).test) == 360
    assert load(DataConfig(validation=0.3), model(10, 1)).test is second.test
    assert load(DataConfig(validation=0.3), model(10, 1), with_test=False).train is second.train


def test_a_share_of_no_image_is_refused() -> None:
    message = refusal(DataConfig(validation=0.001), model(10, 1))
    assert message == ("digits, train split: data.validation = 0.001 sets no image of any class aside; raise it")


# --- decoding


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 80}), ("JPEG", {"quality": 90})],
)
def test_formats_decode_as_pillow_decodes_them(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    originals = pictures(4)
    encoded = [encode(image, form, **options) for image in originals]
    data = load(write_both(tmp_path, {"image": column(encoded), "label": [0, 1, 1, 0]}), model())
    assert torch.equal(
        data.train.pixels, chw(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")) for raw in encoded)
    )
    if form == "PNG" or options.get("lossless"):
        assert torch.equal(data.train.pixels, chw(originals))
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.classes == ("cat", "dog")


def test_colour_becomes_luminance_for_a_grey_model(tmp_path: Path) -> None:
    colours = [np.full((4, 4, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 255, 0), (10, 20, 30))]
    data = load(write_both(tmp_path, {"image": column(colours), "label": [0, 1, 0]}), model(in_chans=1, img_size=4))
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    assert data.train.pixels[:, 0, 0, 0].tolist() == [76, 150, 18]
    assert data.train.pixels.shape == (3, 1, 4, 4)


def test_images_of_different_sizes_are_resized_and_equal_ones_are_not(tmp_path: Path) -> None:
    images = [*pictures(2, height=20, width=12), *pictures(1, height=12, width=20), *pictures(1, height=8, width=8)]
    data = load(write_both(tmp_path / "mixed", {"image": column(images), "label": [0, 1, 0, 1]}), model())
    resized = [np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR)) for image in images]
    assert torch.equal(data.train.pixels, chw(resized))
    assert torch.equal(data.train.pixels[3], chw(images[3:])[0])
    same = write_both(tmp_path / "same", {"image": column(images[:2]), "label": [0, 1]})
    assert load(same, model()).train.pixels.shape == (2, 3, 20, 12)


def test_only_the_images_within_the_limit_are_decoded_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(20)
    write_both(tmp_path, {"image": column(images), "label": [0, 1] * 10})
    decoded: list[str] = []
    original = decode._decode_one

    def counted(encoded: BinaryIO, in_chans: int, where: str, *rest: int) -> Any:
        decoded.append(where)
        return original(encoded, in_chans, where, *rest)

    monkeypatch.setattr(decode, "_decode_one", counted)
    data = parquet(tmp_path, train_limit=6, test_limit=2)
    first = load(data, model())
    load(data, model())
    assert len(decoded) == len(set(decoded)) == 8
    rows = torch.randperm(20, generator=stream(0, "limit", "train"))[:6].sort().values
    assert torch.equal(first.train.pixels, chw(images)[rows])


@pytest.mark.parametrize(
    "broken", [b"", b"no image at all", encode(pictures(1, height=64, width=64)[0])[:2000], b"P5 8 8 255\n123"]
)
def test_a_corrupt_image_is_named(tmp_path: Path, broken: bytes) -> None:
    images: list[Pixels | bytes | None] = [*pictures(4), broken]
    message = refusal(write_both(tmp_path, {"image": column(images), "label": [0, 1, 0, 1, 0]}))
    assert f"{tmp_path / 'train.parquet'} row 4: {UNREADABLE}" in message


def test_channels_other_than_one_and_three_are_refused() -> None:
    assert "model.in-chans = 4" in refusal(DataConfig(), model(10, 4))


# --- Parquet


def test_shards_are_read_in_order_also_from_a_data_folder(tmp_path: Path) -> None:
    images = pictures(10)
    for shard, rows in enumerate((slice(0, 4), slice(4, 10))):
        part = {"image": column(images[rows]), "label": [0, 1, 1, 1, 0, 0, 0, 1, 0, 1][rows]}
        write(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", part)
    write(tmp_path / "data" / "validation.parquet", {"image": column(images[:1]), "label": [1]})
    data = load(parquet(tmp_path), model())
    assert torch.equal(data.train.pixels, chw(images))
    assert data.train.labels.tolist() == [0, 1, 1, 1, 0, 0, 0, 1, 0, 1]
    assert data.test.labels.tolist() == [1]


def test_a_bad_row_is_counted_within_its_shard(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", {"image": column(pictures(4)), "label": [0, 1, 0, 1]})
    write(tmp_path / "train-00001-of-00002.parquet", {"image": column([*pictures(1), b"x"]), "label": [0, 1]})
    assert f"{tmp_path / 'train-00001-of-00002.parquet'} row 1: {UNREADABLE}" in refusal(parquet(tmp_path))


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.parquet", {"image": column(pictures(1)), "label": [0]})
    assert "1 of the 3 shards of 'train'" in refusal(parquet(tmp_path))


def test_shards_with_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", {"image": column(pictures(1)), "label": [0]})
    write(tmp_path / "train-00001-of-00002.parquet", {"image": column(pictures(1))}, features=None)
    assert "train-00001-of-00002.parquet has other columns" in refusal(parquet(tmp_path))


def test_a_copy_beside_the_split_is_not_read_twice(tmp_path: Path) -> None:
    data = write_both(tmp_path, {"image": column(pictures(4)), "label": [0, 1, 0, 1]})
    write(tmp_path / "train_small.parquet", {"image": column(pictures(2)), "label": [0, 1]})
    assert len(load(data, model()).train) == 4


@pytest.mark.parametrize("plain", [True, False])
def test_columns_without_hugging_face_metadata(tmp_path: Path, plain: bool) -> None:
    images = pictures(3)
    cells = [encode(image) for image in images] if plain else column(images)
    written = {"picture": cells, "weight": [0.5, 0.5, 0.5], "kind": [2, 0, 1]}
    data = load(write_both(tmp_path, written, features=None), model(3))
    assert torch.equal(data.train.pixels, chw(images))
    assert data.train.labels.tolist() == [2, 0, 1]
    assert data.classes == ("0", "1", "2")


def test_cells_that_name_a_file(tmp_path: Path) -> None:
    (image,) = pictures(1)
    (tmp_path / "a.png").write_bytes(encode(image))
    cells = [{"bytes": None, "path": "a.png"}]
    assert torch.equal(load(write_both(tmp_path, {"image": cells, "label": [1]}), model()).train.pixels, chw([image]))
    cells = [{"bytes": None, "path": "gone.png"}]
    message = refusal(write_both(tmp_path / "b", {"image": cells, "label": [1]}))
    assert "row 0" in message
    assert "gone.png" in message


def test_two_image_columns_must_be_told_apart(tmp_path: Path) -> None:
    front, back = pictures(2), pictures(2, seed=1)
    data = write_both(tmp_path, {"front": column(front), "back": column(back), "label": [0, 1]}, features=None)
    message = refusal(data)
    assert "several columns with encoded images" in message
    assert "data.image-column" in message
    assert "one of: front (struct), back (struct)" in message
    assert torch.equal(load(parquet(tmp_path, image_column="back"), model()).train.pixels, chw(back))


def test_the_only_typed_image_column_wins_over_plain_bytes(tmp_path: Path) -> None:
    images = pictures(2)
    features = datasets.Features({**FEATURES, "thumbnail": datasets.Value("binary")})
    data = write_both(tmp_path, {"image": column(images), "label": [0, 1], "thumbnail": [b"", b""]}, features)
    assert torch.equal(load(data, model()).train.pixels, chw(images))


@pytest.mark.parametrize(
    ("columns", "configured", "label"),
    [
        (["index", "label"], "", "label"),
        (["coarse_label", "fine_label"], "", "fine_label"),
        (["kind"], "", "kind"),
        (["label", "kind"], "kind", "kind"),
    ],
)
def test_the_label_column_is_found_or_configured(
    tmp_path: Path, columns: list[str], configured: str, label: str
) -> None:
    written = {name: [1, 0] if name == label else [1, 1] for name in columns}
    write_both(tmp_path, {"image": column(pictures(2)), **written}, features=None)
    assert load(parquet(tmp_path, label_column=configured), model()).train.labels.tolist() == [1, 0]


def test_the_class_label_wins_over_other_integers(tmp_path: Path) -> None:
    kinds = {"label": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    features = datasets.Features({"image": datasets.Image(), **kinds})
    data = write_both(tmp_path, {"image": column(pictures(2)), "label": [7, 8], "kind": [1, 0]}, features)
    assert load(data, model()).train.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"label_column": "gone"}, ["no column 'gone'; set data.label-column to one of: a (int64), b (int64)"]),
        (
            {"image_column": "a"},
            ["'a' (int64) does not hold encoded images; set data.image-column to one of: image (struct)"],
        ),
        (
            {"label_column": "image"},
            ["'image' (struct) does not hold labels; set data.label-column to one of: a (int64), b (int64)"],
        ),
        ({}, ["several columns with labels", "data.label-column"]),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict[str, str], named: list[str]) -> None:
    write_both(tmp_path, {"image": column(pictures(2)), "a": [0, 1], "b": [0, 1]}, features=None)
    message = refusal(parquet(tmp_path, **settings))
    assert [name for name in named if name not in message] == []


def test_columns_that_are_not_there_are_listed(tmp_path: Path) -> None:
    names = write_both(tmp_path / "a", {"image": column(pictures(1)), "label": [["cat"]]}, features=None)
    assert "column 'label' (list<element: string>) does not hold labels; none of its columns would do" in refusal(names)
    numbers = write_both(tmp_path / "b", {"pixels": [[1, 2]], "label": [0]}, features=None)
    assert "no column with encoded images" in refusal(numbers)
    assert "pixels (list" in refusal(numbers)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([0, 1, 2, 0], ["train.parquet row 2: label 2 is outside 0..1", "model.num-classes = 3"]),
        ([0, -1, 0, 0], ["train.parquet row 1: label -1 is outside 0..1", "without a label"]),
        ([0, 1, 0, None], ["train.parquet row 3 has no label"]),
    ],
)
def test_a_label_outside_the_classes_is_named(tmp_path: Path, labels: list[int | None], named: list[str]) -> None:
    message = refusal(write_both(tmp_path, {"image": column(pictures(4)), "label": labels}, features=None))
    assert [name for name in named if name not in message] == []


def test_class_names_must_be_as_many_as_the_models_classes(tmp_path: Path) -> None:
    data = write_both(tmp_path, {"image": column(pictures(2)), "label": [0, 1]})
    assert "2 classes, but model.num-classes = 5; set model.num-classes = 2" in refusal(data, model(5))
    assert "set model.num-classes = 10" in refusal(DataConfig(), model(7, 1))


def test_the_test_split_must_have_the_same_classes(tmp_path: Path) -> None:
    data = write_both(tmp_path, {"image": column(pictures(2)), "label": [0, 1]})
    swapped = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    write(tmp_path / "test.parquet", {"image": column(pictures(2)), "label": [0, 1]}, swapped)
    assert "class 'cat' of the train split is 'dog' in the test split" in refusal(data)
    nameless = write_both(tmp_path / "nameless", {"image": column(pictures(2)), "label": [0, 1]})
    write(tmp_path / "nameless" / "test.parquet", {"image": column(pictures(2)), "label": [0, 1]}, features=None)
    assert load(nameless, model()).classes == ("cat", "dog")


def test_missing_and_corrupt_parquet_files_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "gone") in refusal(parquet(tmp_path / "gone"))
    assert "train*.parquet" in refusal(parquet(tmp_path))
    data = write_both(tmp_path, {"image": column(pictures(200, height=16)), "label": [0] * 200})
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:-200])
    assert "train.parquet is not a readable Parquet file" in refusal(data)
    empty = write_both(tmp_path / "empty", {"image": [], "label": []})
    assert "no images" in refusal(empty)
    null = write_both(tmp_path / "null", {"image": [None], "label": [0]})
    assert "train.parquet row 0 has no image" in refusal(null)


# --- ImageFolder


def write_folder(folder: Path, test: str = "test") -> dict[str, list[Pixels]]:
    """Two classes, three training images and one test image each, in three formats."""
    made = {}
    for seed, name in enumerate(("dog", "cat")):
        images = pictures(4, seed=seed)
        for i, (image, form) in enumerate(zip(images, ("PNG", "WEBP", "BMP", "PNG"), strict=True)):
            place = folder / ("train" if i < 3 else test) / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.{form.lower()}").write_bytes(
                encode(image, form, **({"lossless": True} if form == "WEBP" else {}))
            )
        made[name] = images
    return made


def image_folder(folder: Path) -> DataConfig:
    return DataConfig(source="imagefolder", path=str(folder))


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_an_image_folder_sorts_its_classes_by_name(tmp_path: Path, test: str) -> None:
    made = write_folder(tmp_path, test)
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load(image_folder(tmp_path), model())
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.train.pixels, chw(made["cat"][:3] + made["dog"][:3]))
    assert torch.equal(data.test.pixels, chw(made["cat"][3:] + made["dog"][3:]))


def test_a_corrupt_file_in_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    broken = tmp_path / "train" / "dog" / "9.png"
    broken.write_bytes(b"x")
    assert f"{broken}: {UNREADABLE}" in refusal(image_folder(tmp_path))


def _no_test(folder: Path) -> None:
    (folder / "test").rename(folder / "spare")


def _strange_class(folder: Path) -> None:
    (folder / "test" / "emu").mkdir()


def _empty_class(folder: Path) -> None:
    (folder / "train" / "emu").mkdir()


def _flat(folder: Path) -> None:
    (folder / "train").rename(folder / "old")
    (folder / "train").mkdir()


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_no_test, "has no folder test/"),
        (_strange_class, "the class 'emu' is not in"),
        (_empty_class, "emu: no image files"),
        (_flat, "train: no class folders"),
    ],
)
def test_folders_that_are_no_image_folder_are_refused(tmp_path: Path, harm: Callable[[Path], None], named: str) -> None:
    write_folder(tmp_path)
    harm(tmp_path)
    assert named in refusal(image_folder(tmp_path))


def test_one_class_folder_too_many_for_the_model(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "emu").mkdir()
    (tmp_path / "train" / "emu" / "0.png").write_bytes(encode(pictures(1)[0]))
    assert "0.png: label 2 is outside 0..1; set model.num-classes = 3" in refusal(image_folder(tmp_path))


# --- Hugging Face data sets


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's prepared copies stay in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def hub(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(source="hub", path=str(path), **settings)


def test_the_hub_path_reads_a_local_folder_as_the_parquet_path_does(hub_cache: Path) -> None:
    folder = hub_cache / "data-set"
    expected = load(write_both(folder, {"image": column(pictures(6)), "label": [0, 1, 1, 0, 1, 0]}), model())
    for limit in (0, 4):
        data = load(hub(folder, train_limit=limit), model())
        assert data.classes == ("cat", "dog")
        assert torch.equal(data.test.pixels, expected.test.pixels)
        rows = torch.from_numpy(sources.kept(6, limit, "train"))
        assert torch.equal(data.train.pixels, expected.train.pixels[rows])
        assert torch.equal(data.train.labels, expected.train.labels[rows])


def test_hub_rows_are_named(hub_cache: Path) -> None:
    folder = hub_cache / "data-set"
    write_both(folder, {"image": column([*pictures(2), b"x"]), "label": [0, 1, 0]})
    assert f"split 'train', row 2: {UNREADABLE}" in refusal(hub(folder))


def test_a_data_set_saved_to_disk_is_loaded_by_hub_and_refused_elsewhere(hub_cache: Path) -> None:
    images = pictures(4)
    one = datasets.Dataset.from_dict({"image": column(images), "label": [0, 1, 1, 0]}, features=FEATURES)
    datasets.DatasetDict(train=one, validation=one.select([3])).save_to_disk(str(hub_cache / "both"))
    data = load(hub(hub_cache / "both"), model())
    assert torch.equal(data.train.pixels, chw(images))
    assert torch.equal(data.test.pixels, chw(images[3:]))
    for config in (parquet(hub_cache / "both"), image_folder(hub_cache / "both")):
        assert "save_to_disk; set data.source = 'hub'" in refusal(config)
    one.save_to_disk(str(hub_cache / "one"))
    assert "saved without splits" in refusal(hub(hub_cache / "one"))
    assert "save_to_disk" in refusal(parquet(hub_cache / "one"))


def test_a_data_set_that_cannot_be_fetched_is_one_line(hub_cache: Path) -> None:  # noqa: ARG001
    message = refusal(hub("nobody/no-such-data-set"))  # conftest switches the Hub off
    assert "'nobody/no-such-data-set'" in message
    assert "check the name and the network" in message


def test_hub_without_a_test_split_names_it(hub_cache: Path) -> None:
    write(hub_cache / "data-set" / "train.parquet", {"image": column(pictures(2)), "label": [0, 1]})
    assert "has no split 'test' (or testing, " in refusal(hub(hub_cache / "data-set"))


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1"), ("0", "0")])
def test_telemetry_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", before or "")
    if before is None:
        monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
    importlib.reload(flower_datasets)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == after


def test_plots_of_flwr_datasets_are_imported_by_the_first_plot() -> None:
    code = """
import sys
from fedmitr_flwr.data.flower_datasets import IidPartitioner
assert not {"seaborn", "matplotlib.pyplot", "scipy.stats"} & set(sys.modules)
from datasets import Dataset
from flwr_datasets.visualization import plot_label_distributions
partitioner = IidPartitioner(2)
partitioner.dataset = Dataset.from_dict({"label": [0, 1, 1, 1]})
figure, axes, table = plot_label_distributions(partitioner, "label", plot_type="heatmap")
assert table.to_numpy().sum() == 4 and axes.get_images() + list(axes.collections), table
import seaborn, matplotlib.pyplot
assert seaborn.__file__ and matplotlib.pyplot.__file__  # themselves, for whoever imports them after us
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=os.environ | {"MPLBACKEND": "agg"})


# --- real data


def test_fashion_mnist_byte_by_byte(shared: Path) -> None:
    folder = shared / "data" / "fashion_mnist"
    data = load(parquet(folder, train_limit=50, test_limit=20), model(10, 1, 28))
    assert data.train.pixels.shape == (50, 1, 28, 28)
    assert data.classes[0] == "T-shirt/top"
    rows = torch.randperm(10_000, generator=stream(0, "limit", "test"))[:20].sort().values.tolist()
    table = pq.ParquetFile(folder / "test.parquet").read()
    for i, row in enumerate(rows):
        raw = table.column("image")[row].as_py()["bytes"]
        assert bytes(data.test.pixels[i].flatten().tolist()) == Image.open(io.BytesIO(raw)).tobytes()
        assert data.test.labels[i] == table.column("label")[row].as_py()


def test_cifar_10_is_colour_webp(shared: Path) -> None:
    folder = shared / "data" / "cifar10"
    data = load(parquet(folder, train_limit=30, test_limit=10), model(10, 3, 32))
    assert data.train.pixels.shape == (30, 3, 32, 32)
    assert data.classes[9] == "truck"
    row = int(torch.randperm(50_000, generator=stream(0, "limit", "train"))[:30].min())
    cell = pq.ParquetFile(folder / "train.parquet").read(columns=["image"]).column("image")[row].as_py()
    with Image.open(io.BytesIO(cell["bytes"])) as image:
        assert image.format == "WEBP"
        assert torch.equal(data.train.pixels[0], chw([np.asarray(image)])[0])

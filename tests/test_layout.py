"""What lies at a path is found out: its source, its splits by their names, and what of it is no data."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_decode import encode
from tiny import SIZES, small

from fedmitr_flwr.common.errors import ConfigError, DataError
from fedmitr_flwr.config import Config, DataConfig
from fedmitr_flwr.data import layout, sources
from fedmitr_flwr.data.layout import check_shards, found_source
from fedmitr_flwr.data.own import Place, load_own
from fedmitr_flwr.data.sources import load, open_split
from fedmitr_flwr.report.words import data_set

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})


def picture(value: int = 0, form: str = "PNG") -> bytes:
    return encode(np.full((4, 4), value, np.uint8), form)


def folders(root: Path, train: str = "train", test: str = "test", number: int = 2) -> Path:
    for split in (train, test):
        for label, name in enumerate(("cat", "dog")):
            place = root / split / name
            place.mkdir(parents=True)
            for image in range(number):
                (place / f"{image}.png").write_bytes(picture(100 * label + image))
    return root


def a_table(labels: list[object]) -> pa.Table:
    return pa.table({"image": [picture(row) for row in range(len(labels))], "label": labels})


def parquet(root: Path, train: str = "train", test: str = "test") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split in (train, test):
        pq.write_table(a_table([0, 1, 1, 0]), root / f"{split}.parquet")
    return root


def write_splits(root: Path, train: pa.Table, test: pa.Table | None = None) -> DataConfig:
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(train, root / "train.parquet")
    pq.write_table(test or train, root / "test.parquet")
    return DataConfig(path=str(root))


def saved(root: Path, train: str = "train", test: str = "test") -> Path:
    cells = [{"bytes": picture(row), "path": None} for row in range(4)]
    one = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 1, 0]}, features=FEATURES)
    datasets.DatasetDict({train: one, test: one}).save_to_disk(str(root))
    return root


def refusal(path: Path | str, source: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        open_split(DataConfig(path=str(path), source=source), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("make", "source"), [(folders, "imagefolder"), (parquet, "parquet"), (saved, "hub")])
def test_the_source_is_found_and_every_name_of_a_split_is_known(
    tmp_path: Path, make: Callable[..., Path], source: str
) -> None:
    """Expected by hand: the labels of four rows in two classes."""
    names = [*(("train", test) for test in layout.TEST_NAMES), ("training", "test"), ("Train", "Valid")]
    for train, test in names:
        data = DataConfig(path=str(make(tmp_path / f"{train}-{test}", train, test)))
        assert found_source(data).source == source
        for split in ("train", "test"):
            assert sorted(open_split(data, split).labels.tolist()) == [0, 0, 1, 1]
    if make is not saved:  # a site's own folder
        flat = SIZES | {"partition.scheme": "own", "partition.min-size": 1, "model.num-classes": 2}
        config = Config.from_flat(flat | {"data.classes": "cat | dog" if make is folders else "0 | 1"})
        assert len(load_own(Place(str(make(tmp_path / "site", "Training", "dev"))), config)) == 4


def test_a_source_without_a_path_or_on_the_hub(tmp_path: Path) -> None:
    """A path beside digits is refused; titles of old runs go by what was read."""
    assert found_source(DataConfig()).source == "digits"
    assert found_source(DataConfig(path="zalando-datasets/fashion_mnist")).source == "hub"
    assert found_source(DataConfig(path=str(tmp_path), source="parquet")).source == "parquet"
    (tmp_path / "images.csv").write_text("image,label\n")
    assert found_source(DataConfig(path=str(tmp_path))).source == "hub"
    with pytest.raises(ConfigError, match=r"data\.path = '/x' is not read with data\.source = 'digits'; leave out one"):
        DataConfig(source="digits", path="/x")
    assert data_set({"data.source": "digits", "data.path": "/photographs"}) == "digits"
    assert data_set({"data.source": "imagefolder", "data.path": "/photographs"}) == "photographs"


def test_what_is_no_source_is_one_line(tmp_path: Path) -> None:
    both = parquet(folders(tmp_path / "both"))
    assert "has Parquet files (train.parquet) and class folders (train/); keep one of the two" in refusal(both)
    flat = folders(tmp_path / "flat") / "train"
    assert "has folders of images, but no split; an ImageFolder is train/<class>/<image files>" in refusal(flat)
    (tmp_path / "empty").mkdir()
    assert "neither train*.parquet, nor train/<class>" in refusal(tmp_path / "empty")
    assert "is a file; give the folder" in refusal(both / "train.parquet")
    assert "there is no folder" in refusal(tmp_path / "gone")
    cased = folders(tmp_path / "cased")
    (cased / "Train").mkdir()
    assert "has Train/ and train/; keep one" in refusal(cased)


def test_hidden_and_system_folders_and_files_are_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path)
    names = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
    for name in (*names, ".thumbnails"):
        shutil.copytree(root / "train" / "dog", root / "train" / "cat" / name)
        shutil.copytree(root / "train" / "dog", root / "train" / name)
    for file in ("cat/._0.png", "cat/Thumbs.db", "cat/a.txt", "cat/b.TXT", "dog/film.mp4", "loose.png", "cat/page.eps"):
        (root / "train" / file).write_bytes(picture())
    data = DataConfig(path=str(root))
    for _ in range(2):
        assert open_split(data, "train").labels.tolist() == [0, 0, 1, 1]
    (line,) = [record.message for record in caplog.records]
    counted = ".txt 2, pictures outside of class folders 1, hidden .png 1, .eps 1, .mp4 1"
    assert line.startswith(f"{root}/train: passed over 6 files that are no pictures: {counted}; 14 hidden or system")


def test_every_suffix_that_pillow_opens_is_read(tmp_path: Path) -> None:
    root = folders(tmp_path)
    suffixes = {".jfif": "JPEG", ".JPE": "JPEG", ".apng": "PNG", ".jp2": "JPEG2000", ".tga": "TGA", ".pbm": "PPM"}
    for suffix, form in suffixes.items():
        (root / "train" / "cat" / f"x{suffix}").write_bytes(picture(7, form))
    assert len(load(DataConfig(path=str(root)), small(num_classes=2)).train) == 4 + len(suffixes)


def test_links_are_followed_without_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path / "set")
    shutil.copytree(root / "train" / "cat", tmp_path / "elsewhere" / "deep")
    cat = root / "train" / "cat"
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    for name, target in {"up": "..", "itself": "itself", "twice": "more/deep", "gone.png": "/nowhere"}.items():
        (cat / name).symlink_to(target)
    assert open_split(DataConfig(path=str(root)), "train").labels.tolist() == [0] * 4 + [1] * 2
    left = ", ".join(str(cat / name) for name in ("gone.png", "itself", "twice", "up"))
    assert f"links that lead nowhere, or to what is read anyway: {left}" in caplog.text


def test_a_test_split_without_classes_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for inside in ("", "unknown"):
        root = folders(tmp_path / f"set-{inside}", test="val")
        (root / "test" / inside).mkdir(parents=True)
        (root / "test" / inside / "0.png").write_bytes(picture())
        assert open_split(DataConfig(path=str(root)), "test").labels.tolist() == [0, 0, 1, 1]
        assert f"test has no folders of the classes and is passed over; {root}/val is the test split" in caplog.text


def test_class_folders_of_one_name_in_two_spellings(tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "train" / "cat").rename(root / "train" / "caf\u00e9")  # one letter
    (root / "test" / "cat").rename(root / "test" / "cafe\u0301")  # two
    assert open_split(DataConfig(path=str(root)), "test").labels.tolist() == [0, 0, 1, 1]
    shutil.copytree(root / "test" / "cafe\u0301", root / "train" / "cafe\u0301")
    assert "two class folders are called" in refusal(root)
    shutil.rmtree(root / "train" / "cafe\u0301")
    (root / "train" / "caf\u00e9").rename(root / "train" / os.fsdecode(b"caf\xe9"))
    message = refusal(root)  # before training
    assert r"the class folder 'caf\udce9' has a name that is not UTF-8; rename it" in message
    message.encode("ascii")


@pytest.mark.parametrize(("behind", "suffix"), [("", "parquet"), ("-1f0c2a9b7d3e4f56", "arrow")])
def test_missing_and_mixed_shards(behind: str, suffix: str) -> None:
    def files(*numbers: int, total: int = 3, hashed: str = behind) -> list[Path]:
        return [Path(f"/d/train-{number:05}-of-{total:05}{hashed}.{suffix}") for number in numbers]

    for complete in (files(0, 1, 2), files(1, 2, 3), [Path("/d/train.parquet")], []):
        check_shards(complete)
    for chosen, problem in (
        (files(0), "has 1 of the 3 shards of 'train'"),
        (files(0, 1, 3), "has 3 of the 3 shards of 'train'"),
        (files(0, 0, 1), "has 2 of the 3 shards of 'train'"),
        ([*files(0, 1, 2), *files(0, 1, 2, hashed="-00aa")], "shards of 'train' more than once"),
        ([*files(0, 1, 2), *files(0, total=1)], "has 'train' in 00003 shards and in 00001"),
    ):
        with pytest.raises(DataError, match=problem):
            check_shards(chosen)


def test_a_missing_shard_is_noticed_in_every_source(tmp_path: Path) -> None:
    pq.write_table(a_table([0, 1]), tmp_path / "train-00000-of-00003-1f0c2a9b.parquet")
    assert "1 of the 3 shards of 'train'" in refusal(tmp_path)
    assert "1 of the 3 shards of 'train'" in refusal(tmp_path, "hub")
    config = Config.from_flat(SIZES | {"partition.scheme": "own", "data.classes": "0|1|2|3|4|5|6|7|8|9"})
    with pytest.raises(DataError, match="cannot be read"):
        load_own(Place(str(tmp_path)), config)
    whole = saved(tmp_path / "saved")
    (whole / "train" / "data-00000-of-00001.arrow").rename(whole / "train" / "data-00000-of-00002.arrow")
    assert "1 of the 2 shards of 'data'" in refusal(whole)


def test_a_cell_names_no_file_outside_of_the_data(tmp_path: Path) -> None:
    """Relative to the Parquet file, which lies deeper; an absolute path, too, must be inside."""
    root, model = tmp_path / "set", small(num_classes=2)
    (root / "data" / "images").mkdir(parents=True)
    for place in (tmp_path, root / "data" / "images", root):
        for name in ("secret.png", "0.png"):
            (place / name).write_bytes(picture())
    for path in ("images/0.png", "../../secret.png", f"{tmp_path}/secret.png", "images/../../../secret.png"):
        cells = pa.array([{"bytes": None, "path": "../0.png"}, {"bytes": None, "path": path}])
        write_splits(root / "data", pa.table({"image": cells, "label": [0, 1]}))
        sources._load_split.cache_clear()
        if path == "images/0.png":
            assert len(load(DataConfig(path=str(root)), model).train) == 2
            continue
        told = r"train\.parquet row 1: the image file '.*secret\.png' is outside of the data's"
        with pytest.raises(DataError, match=told):
            load(DataConfig(path=str(root)), model)

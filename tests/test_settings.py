"""Settings as text: what people write is taken, what cannot be meant is named with what may be."""

from pathlib import Path

import pytest

from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.text import keys_like, located, parse_assignment, read_flat, read_settings

KNOWN = Config().to_flat()


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("local.lr = 1e-3", "local.lr", 0.001),
        ("data.path=/data/a=b", "data.path", "/data/a=b"),
        ("data.path=1\nseed=3", "data.path", "1\nseed=3"),
        ("out-dir=", "out-dir", ""),
        ("flower.options=eta=0.1, tau=0", "flower.options", "eta=0.1, tau=0"),
        ("local.lr=1", "local.lr", 1.0),
        ("data.flip=True", "data.flip", "true"),
        ("local.augment=True", "local.augment", True),
        ("local.augment=False", "local.augment", False),
        ("local.epochs=1e3", "local.epochs", 1000),
        ("local.epochs=7.", "local.epochs", 7),
        ("local.batch_size=8", "local.batch-size", 8),
        ("local.lr=.5", "local.lr", 0.5),
        ("inversion.stops=0.1", "inversion.stops", "0.1"),
        ("inversion.stops=[0.1, 0.3]", "inversion.stops", "0.1,0.3"),
        ('data.classes=["a", "b,c"]', "data.classes", "a | b,c"),
        ("data.path=2024-01-31", "data.path", "2024-01-31"),  # a folder and no date
        ("data.path=1_000", "data.path", "1_000"),
        ("data.path=True", "data.path", "True"),
        ("data.path=[1]", "data.path", "[1]"),
        ('data.path="007"', "data.path", "007"),
    ],
)
def test_what_people_write_on_a_command_line(word: str, key: str, value: object) -> None:
    flat = dict([parse_assignment(word, KNOWN)])
    found = Config.from_flat({"partition.scheme": "own", "model.num-classes": 2} | flat).to_flat()[key]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("word", ["seed", "", "=3", " = 3"])
def test_words_that_are_no_assignment(word: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form key=value"):
        parse_assignment(word)


@pytest.mark.parametrize(
    ("key", "value", "likely"),
    [
        ("lr", 0.1, ["local.lr", "distill.lr"]),
        ("alpha", 0.1, ["partition.alpha"]),
        ("epochs", 3, ["local.epochs"]),
        ("epoch", 3, ["local.epochs"]),
        ("clients", 3, ["partition.clients"]),  # flower.clients is a list of names
        ("clients", "a | b", ["flower.clients"]),
        ("num_clients", 3, ["partition.clients"]),
        ("local.learning-rate", 0.1, ["local.lr"]),
        ("distill.LearningRate", 0.1, ["distill.lr"]),
        ("local.batchsize", 3, ["local.batch-size"]),
        ("lokal.lr", 0.1, ["local.lr"]),
        ("sede", 3, ["seed"]),
        ("Seed", 3, ["seed"]),
        ("local.head", 0.1, ["local.head-lr"]),
        ("strategy", "fedavg", ["flower.strategy"]),
        ("zzz", 3, []),
    ],
)
def test_a_key_is_found_by_its_last_part_and_by_what_others_call_it(key: str, value: object, likely: list[str]) -> None:
    assert keys_like(key, KNOWN, value) == likely


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"privacy": 3}, "'privacy'; it is a section, whose settings are: privacy.epsilon, privacy.delta"),
        ({"local.batchsize": 3}, "unknown config key 'local.batchsize'; did you mean local.batch-size?"),
        ({"zzz": 3}, "'zzz'; the keys are listed in pyproject.toml"),
        ({"method": "fedavg", "ensemble.weights": "sise"}, "counts | estimated; did you mean size?"),
        ({"data.source": "parkett"}, "did you mean parquet?"),
        ({"inversion.batch-size": 99999999999999999999}, "use a whole number of at most 64 bits"),
        ({"seed": 10**5000}, "seed = an integer of more than 40 digits is not possible"),
        ({"local.epochs": 1e30}, "use a whole number of at most 64 bits"),
    ],
)
def test_keys_and_values_that_cannot_be_meant(flat: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(flat)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed = 1".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        (b"seed\0", "is a binary file"),
        (b"flip = True", "truth values are true and false, in lower case"),
        (b"local.batch-size = 1\nlocal.batch_size = 2", "local.batch-size is there twice"),
        (b"[grid]\nseed = [1]", "is a bench file, with a [grid]; run it by: fedmitr bench"),
        (None, "is a folder; give the path of a file in it"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\r\n[local]\r\nepochs = 2\r\n")  # a byte order mark is passed over
    assert read_flat(path) == {"seed": 3, "local.epochs": 2}
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_flat(path)
    assert message in str(caught.value)
    assert str(caught.value).count(str(path)) == 1 + ("fedmitr bench" in message)


def test_a_path_is_relative_to_whatever_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, here = tmp_path / "files", tmp_path / "here"
    for folder in (files / "images", here / "images"):
        folder.mkdir(parents=True)
    (files / "a.toml").write_text(
        "out-dir = 'runs'\nresume-from = '../old'\ndata.source = 'imagefolder'\ndata.path = 'images'\n"
        "feddf.path = '~/x'\nmodel.weights = 'timm'\n"
    )
    monkeypatch.chdir(here)
    for file in (files / "a.toml", Path("../files/a.toml")):
        assert read_settings(file, ["model.weights=w.safetensors"], KNOWN) == {
            "out-dir": str(files / "runs"),
            "resume-from": str(tmp_path / "old"),
            "data.source": "imagefolder",
            "data.path": str(files / "images"),
            "feddf.path": str(Path.home() / "x"),
            "model.weights": str(here / "w.safetensors"),
        }
    assert read_settings(files / "a.toml", ["data.path=images"], KNOWN)["data.path"] == str(here / "images")


def test_a_data_set_of_the_hub_is_no_path_unless_there_is_one(tmp_path: Path) -> None:
    hub = {"data.source": "hub", "data.path": "some/name"}
    assert located(hub, tmp_path) == hub
    (tmp_path / "some/name").mkdir(parents=True)
    assert located(hub, tmp_path)["data.path"] == str(tmp_path / "some/name")
    for name in ("n" * 5000, "a\0b"):
        assert located(hub | {"data.path": name}, tmp_path)["data.path"] == name
    folder = {"data.source": "parquet", "data.path": "no/name"}
    assert located(folder, tmp_path)["data.path"] == str(tmp_path / "no/name")

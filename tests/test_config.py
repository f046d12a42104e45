"""Settings: what people write is taken, what is refused or not read, and how that is said."""

import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, an_upload, fused, same, settings

from fedmitr_flwr import methods
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config import Config, FlowerConfig
from fedmitr_flwr.config.earlier import RETIRED, upgraded
from fedmitr_flwr.config.text import flatten, keys_like, located, parse_assignment, read_flat, read_settings
from fedmitr_flwr.config.unread import unread_line
from fedmitr_flwr.flower.strategies import check as check_strategy

DEFAULTS = Config().to_flat()

text = st.text(st.characters(codec="utf-8"))  # any that can be in a file: no lone surrogates
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
# Values inside every limit, for the settings without a fixed list of choices.
free_values = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("device", "method", "out-dir", "resume-from", "model.name", "data.path"), text),
        **dict.fromkeys(("data.image-column", "flower.strategy"), text),
        **dict.fromkeys(("seed", "data.train-limit", "local.epochs"), st.integers(0, 2**63 - 1)),
        **dict.fromkeys(("local.lr", "partition.alpha", "local.outliers"), positive),
        "data.flip": st.sampled_from(["auto", "false", "true"]),
        "local.augment": st.booleans(),
        "flower.quorum": st.floats(0.01, 1),
    },
)


@hypothesis.settings(max_examples=20)
@given(free_values)
def test_toml_round_trip(values: dict[str, object]) -> None:
    config = Config.from_flat(values)
    document = config.to_toml()
    assert Config.from_toml(document) == Config.from_flat(config.to_flat()) == Config.from_flat({}, config) == config
    assert tomllib.loads(document.encode().decode())  # it can be in a file
    assert len(document.splitlines()) >= len(DEFAULTS)
    for key, value in values.items():
        assert (type(config.to_flat()[key]), config.to_flat()[key]) == (type(value), value)


def test_nested_tables_and_dotted_keys_mean_the_same() -> None:
    nested = Config.from_toml("seed = 3\n[local]\nlr = 0.5\n[flower]\nclients = ' hospital-a|factory '\n")
    assert nested == Config.from_toml("seed = 3\nlocal.lr = 0.5\nflower.clients = ' hospital-a|factory '\n")
    assert [nested.flower.label(client) for client in range(3)] == ["0 (hospital-a)", "1 (factory)", "2"]
    later = Config.from_flat({"seed": 6}, nested).with_clients(7)
    assert later.to_flat() == nested.to_flat() | {"seed": 6, "partition.clients": 7}


def test_what_people_write_on_a_command_line() -> None:
    written: dict[str, object] = {
        "seed=3": 3,
        "local.lr = 1e-3": 0.001,
        "data.path=/data/a=b": "/data/a=b",
        "data.path=1\nseed=3": "1\nseed=3",
        "out-dir=": "",
        "flower.options=eta=0.1, tau=0": "eta=0.1, tau=0",
        "data.flip=True": "true",
        "local.augment=False": False,
        "local.epochs=1e3": 1000,
        "local.batch_size=8": 8,
        "local.lr=.5": 0.5,
        "inversion.stops=0.1": "0.1",
        "inversion.stops=[0.1, 0.3]": "0.1,0.3",
        'data.classes=["a", "b,c"]': "a | b,c",
        "data.path=2024-01-31": "2024-01-31",  # a folder and no date
        "data.path=[1]": "[1]",
        'data.path="007"': "007",
    }
    for word, value in written.items():
        key, parsed = parse_assignment(word, DEFAULTS)
        found = Config.from_flat({"partition.scheme": "own", "model.num-classes": 2, key: parsed}).to_flat()[key]
        assert (type(found), found) == (type(value), value), word
    for word in ("seed", "", "=3", " = 3"):
        with pytest.raises(ConfigError, match="is not of the form key=value"):
            parse_assignment(word)


def test_a_key_is_found_by_its_last_part_and_by_what_others_call_it() -> None:
    likely = {
        ("lr", 0.1): "local.lr distill.lr",
        ("clients", 3): "partition.clients",  # flower.clients is a list of names
        ("clients", "a | b"): "flower.clients",
        ("num_clients", 3): "partition.clients",
        ("distill.LearningRate", 0.1): "distill.lr",
        ("local.batchsize", 3): "local.batch-size",
        ("lokal.lr", 0.1): "local.lr",
        ("sede", 3): "seed",
        ("local.head", 0.1): "local.head-lr",
        ("epochs", 3): "local.epochs distill.epochs-per-round",
        ("distil.epochs", 3): "distill.epochs-per-round",
        ("batch", 3): "local.batch-size inversion.batch-size",
        ("zzz", 3): "",
    }
    assert {(key, value): " ".join(keys_like(key, DEFAULTS, value)) for key, value in likely} == likely


@given(text.filter(lambda key: key not in DEFAULTS), st.integers())
def test_unknown_keys_are_named(key: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({key: value})
    assert repr(key) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_retired_key_is_refused_with_what_holds_in_its_place() -> None:
    """In a file and on the command line, in either spelling; no key is both retired and there."""
    assert RETIRED["distill.high"] == "it is 0.1 for all"
    for key, instead in RETIRED.items():
        assert key not in DEFAULTS
        for spelling in (key, key.replace("-", "_")):
            with pytest.raises(ConfigError) as caught:
                Config.from_toml(f"{spelling} = 1")
            assert str(caught.value) == f"config key {key!r} was retired: {instead}; remove it"
        assert "\n" not in instead


def refusal(flat: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(flat)
    return str(caught.value)


def test_wrong_types_are_named_in_plain_words() -> None:
    number, whole, choice = "it must be a number", "it must be a whole number", "it must be true or false"
    for key, value, message in (
        ("local.lr", True, f"local.lr = True is a truth value; {number}"),
        ("local.epochs", 2.5, f"local.epochs = 2.5 is a decimal number; {whole}"),
        ("local.epochs", [1], f"local.epochs = [1] is a list; {whole}"),
        ("local.epochs", "many", f"local.epochs = 'many' is text; {whole}"),
        ("local.augment", "yes", f"local.augment = 'yes' is text; {choice}"),
        ("data.path", True, "data.path = True is a truth value; it must be text (in quotes)"),
        ("data.path", [1], "data.path = [1] is a list; it must be text (in quotes)"),
        ("seed", 2**63, "seed = 9223372036854775808 is not possible; use a whole number of at most 64 bits"),
        ("local.epochs", 1e30, "use a whole number of at most 64 bits"),
        ("seed", 10**5000, "seed = an integer of more than 40 digits is not possible"),
        ("local.lr", float("nan"), "local.lr = nan is not a finite number"),
        ("local.lr", 10**400, "local.lr = inf is not a finite number"),
        ("data.path", "\udcff", r"data.path = '\udcff' is not valid Unicode text; rename what it names"),
        ("privacy", 3, "'privacy'; it is a section, whose settings are: privacy.epsilon, privacy.delta"),
        ("zzz", 3, "'zzz'; `fedmitr config` lists all keys"),
        ("ensemble.weights", "sise", "counts | estimated; did you mean size?"),
    ):
        assert message in refusal({key: value})


# One value just outside each limit; a new check in sections.py belongs here too.
BELOW_0 = """
seed threads data.train-limit data.test-limit model.img-size model.patch-size model.in-chans local.epochs local.lr
local.head-lr local.outliers privacy.epsilon krum.hostile distill.epochs-per-round distill.lr
"""
AT_0 = """
partition.alpha partition.classes-per-client partition.min-size model.depth local.batch-size local.threads
privacy.delta privacy.clip screen.max-images inversion.steps inversion.batch-size distill.rounds
distill.images-per-round evaluate.holdout flower.rounds flower.node-wait flower.upload-timeout
"""
NO_CHOICE = """
data.source data.flip data.unknown-classes partition.scheme local.optimizer upload.dtype screen.mode
ensemble.combine ensemble.weights inversion.mode inversion.prior relabel.mode distill.init evaluate.where
"""
BEYOND: dict[str, object] = {
    **dict.fromkeys(BELOW_0.split(), -1),
    **dict.fromkeys(AT_0.split(), 0),
    **dict.fromkeys(("partition.clients", "model.num-classes"), 1),
    **dict.fromkeys(NO_CHOICE.split(), "other"),
    **dict.fromkeys(("data.validation", "data.proxy"), 0.95),
    "flower.quorum": 1.1,
    "data.classes": "cat | dog |",
    "model.width": 24,
    "upload.extras": "counts, means",
    "inversion.route": 1.5,
    "inversion.stops": "0.5,0.1",
    "flower.options": "eta=fast",
    "flower.clients": "a | b | a",
}


def test_each_limit_is_refused_by_name() -> None:
    for key, value in BEYOND.items():
        assert re.fullmatch(f"{key} = .*", refusal({key: value})), key


def test_impossible_combinations_are_named_with_the_fix() -> None:
    own, dealt = {"partition.scheme": "own"}, {"partition.scheme": "classes-per-client", "model.num-classes": 10}
    for flat, message in (
        ({"data.source": "hub"}, "data.path is empty; data.source = 'hub' needs a data set's name"),
        ({"data.source": "parquet"}, "data.path is empty; data.source = 'parquet' needs a folder"),
        ({"model.img-size": 9, "model.patch-size": 2}, "img-size = 9 is not possible; use a multiple of model.patch"),
        ({"ensemble.weights": "counts"}, "set upload.extras = 'counts'"),
        ({"flower.options": "eta=1, eta=2"}, "flower.options = 'eta=1, eta=2' is not possible; use different names"),
        ({"flower.options": "eta=nan"}, "flower.options = 'eta=nan' is not possible"),
        ({"data.validation": 0.5, "data.proxy": 0.5}, "data.proxy = 0.5 is not possible; use less: with"),
        ({"inversion.route": 0.5, "ensemble.weights": "size"}, "use 'estimated' or 'counts', or set inversion.route"),
        ({"data.validation": 0.2, "evaluate.where": "clients"}, "set data.validation = 0, or evaluate.where"),
        ({"data.classes": "a | b"}, "data.classes = 'a | b' is for partition.scheme = 'own'; leave it empty"),
        ({**own, "data.classes": "a | b", "model.num-classes": 10}, "'a | b' has 2 names, but model.num-classes = 10"),
        ({**own, "data.train-limit": 5}, "set data.train-limit = 0"),
        ({**dealt, "partition.classes-per-client": 11}, "client = 11 is not possible; use at most model.num-classes"),
        ({"inversion.mode": "pri4", "model.img-size": 8, "model.patch-size": 8}, "patches and steps, not 1 and 60"),
        ({"inversion.mode": "pri4", "inversion.steps": 3}, "needs 4 patches and steps, not 4 and 3; use 'sparse'"),
        ({"inversion.stops": "0.1;0.2"}, "inversion.stops = '0.1;0.2' is not a list of numbers separated by commas"),
        *(({"inversion.stops": stops}, "use rising fractions") for stops in ("0.5,0.5", "0,0.5", "0.5,nan")),
    ):
        assert message in refusal(flat)


def test_old_settings_are_taken_as_today_s() -> None:
    """What of uploads is in upload.extras now, and of strategies in flower.options; a new start is told so."""
    counts, statistics, variances = "upload.class-counts", "upload.statistics", "upload.variances"
    old_extras: dict[str, dict[str, object]] = {
        "counts": {counts: True, statistics: False, variances: False},
        "variances": {counts: False, statistics: True, variances: True},
        "moments": {counts: False, "upload.directions": 32},
        "": {statistics: False, "upload.directions": 8},  # which nothing here can read
        "statistics, moments": {counts: True, statistics: True, "upload.directions": 32},
    }
    for extras, old in old_extras.items():
        assert upgraded(old | {"seed": 3}) == {"seed": 3, "upload.extras": extras}
    old_options: list[tuple[str, dict[str, object], str]] = [
        ("fedprox", {"strategy.mu": 0.0, "strategy.eta": -1.0}, "proximal_mu=0.0"),
        ("fedadam", {"strategy.eta": 0.1, "strategy.tau": 1e-05}, "eta=0.1, tau=1e-05"),
        ("fedavgm", {"strategy.eta": 0.5, "strategy.momentum": -1.0}, "server_learning_rate=0.5"),
        ("oneshot", {"strategy.eta": -1.0, "strategy.lr": -1.0}, ""),
    ]
    for strategy, old, options in old_options:
        found = upgraded(old | {"flower.strategy": strategy})
        assert found == {"flower.strategy": strategy, "flower.options": options}
        if options:
            check_strategy(Config.from_flat(found))
    for rate, wanted in ((0.0, 0.01), (0.1, 0.1)):  # 0 was: as the rest
        rates: dict[str, object] = {"local.lr": 0.01, "local.head-lr": rate}
        assert upgraded(rates) == rates | {"local.head-lr": wanted}
    assert upgraded(DEFAULTS) == DEFAULTS
    for key, now in {
        counts: "upload.extras = 'counts'",
        "upload.directions": "upload.extras = 'moments'",
        "strategy.eta": "flower.options = 'eta=...', or 'server_learning_rate=...' for fedavgm",
    }.items():
        assert refusal({key: 1}) == f"config key {key!r} was renamed; write {now}"


def test_extras_imply_what_they_need() -> None:
    for extras, implied in {
        "": set(),
        "counts": {"counts"},
        "statistics": {"counts", "statistics"},
        "variances|moments": {"counts", "statistics", "variances", "moments"},
        " moments , counts": {"counts", "moments"},
    }.items():
        upload = Config.from_flat({"upload.extras": extras}).upload
        shown = {name for name in ("counts", "statistics", "variances", "moments") if getattr(upload, name)}
        assert shown == upload.all_extras == implied


@given(text)
def test_any_text_as_toml_is_parsed_or_refused(document: str) -> None:
    with suppress(ConfigError):  # any other exception fails the test
        Config.from_toml(document)


def test_a_bad_file_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\r\n[local]\r\nepochs = 2\r\n")  # a byte order mark is passed over
    assert read_flat(path) == {"seed": 3, "local.epochs": 2}
    for content, message in (
        (b"seed = ", "bad.toml: not valid TOML"),
        (b"seed = " + b"9" * 5000, "bad.toml: not valid TOML"),
        (b"\xff", "cannot read the config file "),
        (b"sede = 1", "bad.toml: unknown config key 'sede'; did you mean seed?"),
        (b"seed = -1", "bad.toml: seed = -1"),
        ("seed = 1".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        (b"seed\0", "is a binary file"),
        (b"flip = True", "truth values are true and false, in lower case"),
        (b"local.batch-size = 1\nlocal.batch_size = 2", "local.batch-size is there twice"),
        (b"[grid]\nseed = [1]", "is a bench file, with a [grid]; run it by: fedmitr bench"),
        (None, "is a folder; give the path of a file in it"),
    ):
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            Config.from_file(path)
        assert message in str(caught.value)
        assert str(caught.value).count("bad.toml") == 1 + ("fedmitr bench" in message)
    with pytest.raises(ConfigError, match=r"there is no config file .*none; give the path"):
        Config.from_file(tmp_path / "none")


def test_a_path_is_relative_to_whatever_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub is no path unless there is one."""
    files, here = tmp_path / "files", tmp_path / "here"
    for folder in (files / "images", here / "images"):
        folder.mkdir(parents=True)
    (files / "a.toml").write_text(
        "out-dir = 'runs'\nresume-from = '../old'\ndata.source = 'imagefolder'\ndata.path = 'images'\n"
        "feddf.path = '~/x'\nmodel.weights = 'timm'\n"
    )
    monkeypatch.chdir(here)
    for file in (files / "a.toml", Path("../files/a.toml")):
        assert read_settings(file, ["model.weights=w.safetensors"], DEFAULTS) == {
            "out-dir": str(files / "runs"),
            "resume-from": str(tmp_path / "old"),
            "data.source": "imagefolder",
            "data.path": str(files / "images"),
            "feddf.path": str(Path.home() / "x"),
            "model.weights": str(here / "w.safetensors"),
        }
    assert read_settings(files / "a.toml", ["data.path=images"], DEFAULTS)["data.path"] == str(here / "images")
    for name in ("some/name", "n" * 5000, "a\0b"):
        assert located({"data.source": "hub", "data.path": name}, tmp_path)["data.path"] == name
    (tmp_path / "some/name").mkdir(parents=True)
    for source, name in (("hub", "some/name"), ("parquet", "no/name")):
        assert located({"data.source": source, "data.path": name}, tmp_path)["data.path"] == str(tmp_path / name)


def test_each_config_file_finds_its_data_and_weights(shared: Path) -> None:
    for path in (ROOT / "configs").glob("*.toml"):
        config = Config.from_file(path)
        for there in {config.data.path, config.model.weights} - {"", "none"}:
            assert (path.parent / there).resolve().is_relative_to(shared.resolve()), path
            assert (path.parent / there).exists(), path


def test_the_flower_app_has_the_same_keys_and_defaults() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table = flatten(project["tool"]["flwr"]["app"]["config"])
    typed, wanted = ({key: (type(value), value) for key, value in flat.items()} for flat in (table, DEFAULTS))
    assert typed == wanted, "run `python scripts/config_table.py`"


# Every setting there is. Another one needs two committed results with two values of it, or a user's data or machine
# that does; what did not help is a line in docs/LOG.md.
KEYS = {
    "": "method seed device threads workers ray-address out-dir resume-from track",
    "data": "source path image-column label-column train-limit test-limit validation proxy flip classes "
    "unknown-classes",
    "partition": "scheme alpha classes-per-client min-size clients",
    "model": "name img-size patch-size in-chans num-classes width depth weights kwargs",
    "local": "epochs batch-size optimizer lr head-lr augment outliers threads",
    "upload": "dtype extras",
    "privacy": "epsilon delta clip",
    "screen": "mode max-images",
    "krum": "hostile",
    "ensemble": "combine weights",
    "inversion": "mode steps batch-size stops prior route",
    "relabel": "mode",
    "distill": "rounds images-per-round epochs-per-round init lr",
    "feddf": "path",
    "evaluate": "where holdout",
    "flower": "strategy rounds options node-wait upload-timeout quorum clients",
}


def test_there_is_no_setting_beyond_these() -> None:
    named = [f"{section}.{key}".lstrip(".") for section, keys in KEYS.items() for key in keys.split()]
    assert list(Config().to_flat()) == named
    assert len(named) <= 75


# Another value of every setting that a method may not read.
OTHERS: dict[str, object] = {
    "inversion.mode": "dense",
    "inversion.steps": 5,
    "inversion.stops": "0.4",
    "relabel.mode": "none",
    "distill.init": "initial",
    "distill.rounds": 2,
    "distill.images-per-round": 12,
    "distill.epochs-per-round": 2,
    "distill.lr": 0.01,
    "krum.hostile": 0,
}


def line(flat: dict[str, object], **more: Any) -> str:
    config = Config.from_flat(flat)
    return unread_line(config, methods.unread(config), **more)


def test_what_is_not_read_is_said_with_the_reason() -> None:
    """Of a fusion, only what was asked for now."""
    cases: list[tuple[dict[str, object], str]] = [
        ({}, ""),
        ({"partition.scheme": "iid", "partition.alpha": 0.5}, 'partition.alpha = 0.5 (partition.scheme = "iid")'),
        ({"method": "fedavg", "inversion.steps": 7}, "inversion.steps = 7 (method = 'fedavg')"),
        ({"method": "adi", "relabel.mode": "drop"}, "relabel.mode = \"drop\" (method = 'adi')"),
        ({"krum.hostile": 2}, "krum.hostile = 2 (method = 'fedmitr')"),
        ({"krum.hostile": 2, "method": "krum", "feddf.path": "x"}, "feddf.path = \"x\" (method = 'krum')"),
        ({"privacy.clip": 2.0}, "privacy.clip = 2.0 (privacy.epsilon = 0.0)"),
        ({"privacy.clip": 2.0, "privacy.epsilon": 1.0, "local.outliers": 0.0}, ""),
        ({"flower.strategy": "fedavg", "distill.lr": 0.1}, "distill.lr = 0.1 (flower.strategy = 'fedavg')"),
    ]
    for flat, said in cases:
        assert line(flat) == (f"settings that this run does not read: {said}" if said else "")
    fusion: dict[str, object] = {"method": "fedavg", "inversion.steps": 7, "distill.lr": 0.1}
    assert line(fusion, given=["distill.lr"]).endswith(": distill.lr = 0.1 (method = 'fedavg')")


@pytest.mark.parametrize(("method", "clients"), [("layerwise", 2), ("adi", 2), ("dense", 2), ("krum", 4)])
def test_what_is_said_to_be_unread_changes_no_bit(method: str, clients: int) -> None:
    """And what is not said does, of the settings of images and student."""
    flat = {"method": method, "ensemble.weights": "size", "partition.clients": clients, "model.depth": 1}
    flat |= {"ensemble.weights": "estimated"} if method == "layerwise" else {}
    unread = methods.unread(settings(**flat, **OTHERS))
    ignored = {key: value for key, value in OTHERS.items() if key.startswith(tuple(unread))}

    def weights(**changes: object) -> dict[str, torch.Tensor]:
        config = settings(**flat | changes)
        return dict(fused(config, [an_upload(config, client, 10 + client) for client in range(clients)]).weights)

    plain, changed = weights(), weights(**ignored)
    assert ignored
    assert same(changed, plain)
    if read := {key: value for key, value in OTHERS.items() if key.startswith("distill.l") and key not in ignored}:
        assert method in ("adi", "dense")
        assert not same(weights(**read), plain)


def test_of_many_clients_the_first_are_named() -> None:
    flower = FlowerConfig(clients="north | south")
    assert flower.labels(range(3)) == "0 (north), 1 (south), 2"
    assert flower.labels(range(1, 1001)).endswith(", 19, 20, and 980 more")

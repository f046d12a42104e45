"""Settings: what is accepted, what is refused and how the refusal reads."""

import tomllib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.earlier import RETIRED, upgraded
from fedmitr_flwr.config.text import THREE_WAY, flatten, toml_value
from server_app import builtin

ROOT = Path(__file__).parent.parent
DEFAULTS = Config().to_flat()

# Any text that can be in a file: no lone surrogates.
text = st.text(st.characters(codec="utf-8"))
key_of = {
    kind: st.sampled_from([key for key, value in DEFAULTS.items() if type(value) is kind and key not in THREE_WAY])
    for kind in (int, str)
}

# Values inside every limit, for the settings without a fixed list of choices.
free_values = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "device": text,
        "method": text,
        "out-dir": text,
        "resume-from": text,
        "model.name": text,
        "data.path": text,
        "data.image-column": text,
        "data.train-limit": st.integers(0, 2**63 - 1),
        "data.flip": st.sampled_from(["auto", "false", "true"]),
        "local.augment": st.booleans(),
        "local.lr": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "local.outliers": st.floats(min_value=0, allow_infinity=False),
        "local.epochs": st.integers(1, 2**63 - 1),
        "partition.alpha": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "flower.quorum": st.floats(0.01, 1),
        "flower.strategy": text,
    },
)


@given(free_values)
def test_toml_round_trip(values: dict[str, object]) -> None:
    config = Config.from_flat(values)
    document = config.to_toml()
    assert Config.from_toml(document) == Config.from_flat(config.to_flat()) == Config.from_flat({}, config) == config
    assert tomllib.loads(document.encode().decode())  # it can be in a file
    assert len(document.splitlines()) >= len(DEFAULTS)
    for key, value in values.items():
        assert config.to_flat()[key] == value


@given(text | st.booleans() | st.integers() | st.floats(allow_nan=False))
def test_every_value_is_valid_toml(value: bool | int | float | str) -> None:
    parsed = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_nested_tables_and_dotted_keys_mean_the_same() -> None:
    nested = Config.from_toml("seed = 3\n[local]\nlr = 0.5\nbatch-size = 8\n")
    dotted = Config.from_toml("seed = 3\nlocal.lr = 0.5\nlocal.batch-size = 8\n")
    assert nested == dotted
    assert nested.to_flat() == {**DEFAULTS, "seed": 3, "local.lr": 0.5, "local.batch-size": 8}
    assert Config.from_flat({"seed": 6}, nested).to_flat() == {**nested.to_flat(), "seed": 6}


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("local.lr", "fast", "local.lr = 'fast' is text; it must be a number"),
        ("local.lr", True, "local.lr = True is a truth value; it must be a number"),
        ("local.epochs", 2.5, "local.epochs = 2.5 is a decimal number; it must be a whole number"),
        ("local.epochs", False, "local.epochs = False is a truth value; it must be a whole number"),
        ("local.epochs", [1], "local.epochs = [1] is a list; it must be a whole number"),
        ("local.augment", 1, "local.augment = 1 is a whole number; it must be true or false"),
        ("local.augment", "yes", "local.augment = 'yes' is text; it must be true or false"),
        ("data.path", [1], "data.path = [1] is a list; it must be text (in quotes)"),
        ("seed", 2**63, "seed = 9223372036854775808 is not possible; use a whole number of at most 64 bits"),
        ("local.lr", float("nan"), "local.lr = nan is not a finite number"),
        ("local.lr", 10**400, "local.lr = inf is not a finite number"),
        ("data.path", "\udcff", r"data.path = '\udcff' is not valid Unicode text; rename what it names"),
    ],
)
def test_wrong_types_are_named_in_plain_words(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({key: value})
    assert str(caught.value) == message


@given(st.data())
def test_text_for_a_number_and_a_truth_value_for_text_are_refused_by_name(data: st.DataObject) -> None:
    key = data.draw(key_of[int])
    with pytest.raises(ConfigError, match=f"^{key} = .* is text"):
        Config.from_flat({key: data.draw(text)})
    key = data.draw(key_of[str])
    with pytest.raises(ConfigError, match=f"^{key} = .* is a truth value"):
        Config.from_flat({key: data.draw(st.booleans())})


# One value just outside each limit; a new check in sections.py belongs here too.
BELOW_0 = """
seed threads data.train-limit data.test-limit model.img-size model.patch-size model.in-chans local.epochs local.lr
local.head-lr local.prior-adjust local.outliers privacy.epsilon krum.hostile distill.epochs-per-round
distill.extrapolate distill.lr
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
    **dict.fromkeys(NO_CHOICE.split(), "other"),
    "data.validation": 0.95,
    "data.proxy": 0.95,
    "data.classes": "cat | dog |",
    "partition.clients": 1,
    "model.num-classes": 1,
    "model.width": 24,
    "local.average": 1.1,
    "upload.extras": "counts, means",
    "inversion.route": 1.5,
    "inversion.stops": "0.5,0.1",
    "flower.options": "eta=fast",
    "flower.quorum": 1.1,
    "flower.clients": "a | b | a",
}


def test_each_limit_is_refused_by_name() -> None:
    for key, value in BEYOND.items():
        with pytest.raises(ConfigError) as caught:
            Config.from_flat({key: value})
        assert str(caught.value).startswith(f"{key} = "), key
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"data.source": "hub"}, "data.path is empty; data.source = 'hub' needs a data set's name"),
        ({"data.source": "parquet"}, "data.path is empty; data.source = 'parquet' needs a folder"),
        (
            {"model.img-size": 9, "model.patch-size": 2},
            "img-size = 9 is not possible; use a multiple of model.patch-size = 2",
        ),
        ({"ensemble.weights": "counts"}, "set upload.extras = 'counts'"),
        ({"upload.extras": "count"}, "has 'count'; use counts, statistics, variances, moments, separated by commas"),
        ({"model.width": 40}, "model.width = 40 is not possible; use a multiple of 16, the width of one attention"),
        ({"flower.options": "eta"}, "flower.options = 'eta' is not possible; use different names with numbers"),
        ({"flower.options": "eta=1, eta=2"}, "flower.options = 'eta=1, eta=2' is not possible"),
        ({"flower.options": "eta=nan"}, "flower.options = 'eta=nan' is not possible"),
        ({"data.validation": 0.5, "data.proxy": 0.5}, "data.proxy = 0.5 is not possible; use less: with"),
        (
            {"inversion.route": 0.5, "ensemble.weights": "size"},
            "use 'estimated' or 'counts', or set inversion.route = 0",
        ),
        (
            {"data.validation": 0.2, "evaluate.where": "clients"},
            "set data.validation = 0, or evaluate.where = 'server'",
        ),
        ({"data.classes": "a | b"}, "data.classes = 'a | b' is for partition.scheme = 'own'; leave it empty"),
        (
            {"data.classes": "a | b", "partition.scheme": "own", "model.num-classes": 10},
            "data.classes = 'a | b' has 2 names, but model.num-classes = 10; make them equal",
        ),
        ({"data.train-limit": 5, "partition.scheme": "own"}, "set data.train-limit = 0"),
        ({"data.validation": 0.1, "partition.scheme": "own"}, "set data.validation = 0"),
        (
            {"partition.scheme": "classes-per-client", "partition.classes-per-client": 11, "model.num-classes": 10},
            "partition.classes-per-client = 11 is not possible; use at most model.num-classes = 10",
        ),
        (
            {"inversion.mode": "pri4", "model.img-size": 8, "model.patch-size": 8},
            "inversion.mode = 'pri4' needs 4 patches and steps, not 1 and 60; use 'sparse'",
        ),
        ({"inversion.mode": "pri4", "inversion.steps": 3}, "needs 4 patches and steps, not 4 and 3; use 'sparse'"),
        ({"inversion.stops": "0.1;0.2"}, "inversion.stops = '0.1;0.2' is not a list of numbers separated by commas"),
        ({"inversion.stops": "0.5,0.5"}, "use rising fractions"),
        ({"inversion.stops": "0,0.5"}, "use rising fractions"),
        ({"inversion.stops": "0.5,nan"}, "use rising fractions"),
    ],
)
def test_impossible_combinations_are_named_with_the_fix(flat: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(flat)
    assert message in str(caught.value)


def test_an_old_spelling_is_refused_with_the_new_one() -> None:
    written = {
        "upload.class-counts": "upload.extras = 'counts'",
        "upload.directions": "upload.extras = 'moments'",
        "strategy.eta": "flower.options = 'eta=...', or 'server_learning_rate=...' for fedavgm",
        "strategy.mu": "flower.options = 'proximal_mu=...'",
        "distill.epochs": "distill.rounds",
        "distill.passes": "distill.epochs-per-round",
    }
    for key, now in written.items():
        with pytest.raises(ConfigError) as caught:
            Config.from_flat({key: 1})
        assert str(caught.value) == f"config key {key!r} was renamed; write {now}"


# What old settings of uploads are in upload.extras now, and those of strategies in flower.options.
OLD_EXTRAS: dict[str, dict[str, object]] = {
    "counts": {"upload.class-counts": True, "upload.statistics": False, "upload.variances": False},
    "variances": {"upload.class-counts": False, "upload.statistics": True, "upload.variances": True},
    "moments": {"upload.class-counts": False, "upload.directions": 32},
    "": {"upload.statistics": False, "upload.directions": 8},  # which nothing here can read
    "statistics, moments": {"upload.class-counts": True, "upload.statistics": True, "upload.directions": 32},
}
OLD_OPTIONS: dict[str, dict[str, object]] = {
    "proximal_mu=0.0": {"flower.strategy": "fedprox", "strategy.mu": 0.0, "strategy.eta": -1.0},
    "eta=0.1, tau=1e-05": {"flower.strategy": "fedadam", "strategy.eta": 0.1, "strategy.tau": 1e-05},
    "server_learning_rate=0.5": {"flower.strategy": "fedavgm", "strategy.eta": 0.5, "strategy.momentum": -1.0},
    "client_learning_rate=0.1": {"flower.strategy": "qfedavg", "strategy.lr": 0.1},
    "": {"flower.strategy": "oneshot", "strategy.eta": -1.0, "strategy.lr": -1.0},
}


def test_old_settings_are_taken_as_today_s() -> None:
    for extras, old in OLD_EXTRAS.items():
        assert upgraded(old | {"seed": 3}) == {"seed": 3, "upload.extras": extras}
    for options, old in OLD_OPTIONS.items():
        found = upgraded(old)
        assert found == {"flower.strategy": old["flower.strategy"], "flower.options": options}
        if options:
            builtin.check(Config.from_flat(found))
    for rate, wanted in ((0.0, 0.01), (0.1, 0.1)):  # 0 was: as the rest
        old = {"local.lr": 0.01, "local.head-lr": rate}
        assert upgraded(old) == old | {"local.head-lr": wanted}
    assert upgraded(DEFAULTS) == DEFAULTS


def test_extras_imply_what_they_need() -> None:
    implied = {
        "": set(),
        "counts": {"counts"},
        "statistics": {"counts", "statistics"},
        "variances|moments": {"counts", "statistics", "variances", "moments"},
        " moments , counts": {"counts", "moments"},
    }
    for extras, wanted in implied.items():
        upload = Config.from_flat({"upload.extras": extras}).upload
        assert upload.all_extras == wanted
        shown = {name for name in ("counts", "statistics", "variances", "moments") if getattr(upload, name)}
        assert shown == wanted


def test_derived_values() -> None:
    config = Config.from_flat({"model.img-size": 224, "model.patch-size": 16, "inversion.stops": "0.1, 0.25"})
    assert config.model.num_patches == 196
    assert config.inversion.stop_fractions == (0.1, 0.25)
    assert Config.from_flat({"inversion.stops": ""}).inversion.stop_fractions == ()
    assert config.with_clients(7) == replace(config, partition=replace(config.partition, clients=7))
    assert config.with_clients(7).partition.clients == 7
    named = Config.from_flat({"flower.clients": " hospital-a|factory ", "data.classes": ""})
    assert named.flower.client_names == ("hospital-a", "factory")
    assert [named.flower.label(client) for client in range(3)] == ["0 (hospital-a)", "1 (factory)", "2"]
    assert named.data.class_names == ()


@given(text)
def test_any_text_as_toml_is_parsed_or_refused(document: str) -> None:
    with suppress(ConfigError):  # any other exception fails the test
        Config.from_toml(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = ", r"bad\.toml: not valid TOML"),
        (b"seed = " + b"9" * 5000, r"bad\.toml: not valid TOML"),
        (b"\xff", r"cannot read the config file .*bad\.toml"),
        (b"sede = 1", r"bad\.toml: unknown config key 'sede'; did you mean seed\?"),
        (b"seed = -1", r"bad\.toml: seed = -1"),
    ],
)
def test_a_bad_file_is_named_once(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Config.from_file(path)
    assert str(caught.value).count("bad.toml") == 1
    with pytest.raises(ConfigError, match=r"there is no config file .*none; give the path"):
        Config.from_file(tmp_path / "none")


def test_the_flower_app_has_the_same_keys_and_defaults() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table = flatten(project["tool"]["flwr"]["app"]["config"])
    typed, wanted = ({key: (type(value), value) for key, value in flat.items()} for flat in (table, DEFAULTS))
    assert typed == wanted, "run `python scripts/config_table.py`"


def test_every_config_file_parses() -> None:
    for path in (ROOT / "configs").glob("*.toml"):
        Config.from_file(path)


# Every setting there is. Another one needs two committed results with two values of it, or a user's data or machine
# that does; what did not help is a line in docs/LOG.md.
KEYS = {
    "": "method seed device threads out-dir resume-from",
    "data": "source path image-column label-column train-limit test-limit validation proxy flip classes "
    "unknown-classes",
    "partition": "scheme alpha classes-per-client min-size clients",
    "model": "name img-size patch-size in-chans num-classes width depth weights",
    "local": "epochs batch-size optimizer lr head-lr augment prior-adjust outliers average threads",
    "upload": "dtype extras",
    "privacy": "epsilon delta clip",
    "screen": "mode max-images",
    "krum": "hostile",
    "ensemble": "combine weights",
    "inversion": "mode steps batch-size stops prior route",
    "relabel": "mode",
    "distill": "rounds images-per-round epochs-per-round init extrapolate lr",
    "feddf": "path",
    "evaluate": "where holdout",
    "flower": "strategy rounds options node-wait upload-timeout quorum clients",
}


def test_there_is_no_setting_beyond_these() -> None:
    named = [f"{section}.{key}".lstrip(".") for section, keys in KEYS.items() for key in keys.split()]
    assert list(Config().to_flat()) == named
    assert len(named) <= 75

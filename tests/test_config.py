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
from fedmitr_flwr.config.text import THREE_WAY, flatten, parse_assignment, toml_value
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
    assert Config.from_toml(document) == config
    assert tomllib.loads(document.encode().decode())  # it can be in a file
    assert len(document.splitlines()) >= len(DEFAULTS)
    for key, value in values.items():
        assert config.to_flat()[key] == value


@given(text | st.booleans() | st.integers() | st.floats(allow_nan=False))
def test_every_value_is_valid_toml(value: bool | int | float | str) -> None:
    parsed = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert parsed == value
    assert type(parsed) is type(value)


@given(free_values)
def test_from_flat_takes_what_to_flat_gives(values: dict[str, object]) -> None:
    config = Config.from_flat(values)
    assert Config.from_flat(config.to_flat()) == config
    assert Config.from_flat({}, base=config) == config


def test_nested_tables_and_dotted_keys_mean_the_same() -> None:
    nested = Config.from_toml("seed = 3\n[local]\nlr = 0.5\nbatch-size = 8\n")
    dotted = Config.from_toml("seed = 3\nlocal.lr = 0.5\nlocal.batch-size = 8\n")
    assert nested == dotted
    assert (nested.seed, nested.local.lr, nested.local.batch_size) == (3, 0.5, 8)


def test_base_gives_what_is_absent() -> None:
    base = Config.from_flat({"seed": 5, "local.lr": 0.5})
    assert Config.from_flat({"seed": 6}, base).to_flat() == {**DEFAULTS, "seed": 6, "local.lr": 0.5}


@given(text.filter(lambda key: key not in DEFAULTS), st.integers())
def test_unknown_keys_are_named(key: str, value: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({key: value})
    assert repr(key) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_near_miss_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"unknown config key 'local\.batchsize'; did you mean local\.batch-size\?"):
        Config.from_flat({"local.batchsize": 3})
    with pytest.raises(ConfigError, match=r"'zzz'; the keys are listed in pyproject\.toml"):
        Config.from_flat({"zzz": 3})


@pytest.mark.parametrize("key", sorted(RETIRED))
def test_a_retired_key_is_refused_with_what_holds_in_its_place(key: str) -> None:
    """In a file and on the command line, in either spelling; no key is both retired and there."""
    assert key not in DEFAULTS
    for spelling in (key, key.replace("-", "_")):
        with pytest.raises(ConfigError) as caught:
            Config.from_toml(f"{spelling} = 1")
        assert str(caught.value) == f"config key {key!r} was retired: {RETIRED[key]}; remove it"
    assert "\n" not in RETIRED[key]


def test_a_retired_key_reads_as_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({"distill.high": 0.5})
    assert str(caught.value) == "config key 'distill.high' was retired: it is 0.1 for all; remove it"


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
def test_wrong_types_are_told_in_plain_words(key: str, value: object, message: str) -> None:
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


def test_a_whole_number_is_a_fine_decimal_number() -> None:
    lr = Config.from_flat({"local.lr": 1}).local.lr
    assert lr == 1
    assert type(lr) is float


# One value just outside each limit; a new check in sections.py belongs here too.
BEYOND = {
    "seed": -1,
    "threads": -1,
    "data.source": "mnist",
    "data.train-limit": -1,
    "data.test-limit": -1,
    "data.validation": 0.95,
    "data.classes": "cat | dog |",
    "data.unknown-classes": "keep",
    "partition.scheme": "noniid",
    "partition.alpha": 0,
    "partition.classes-per-client": 0,
    "partition.min-size": 0,
    "partition.clients": 1,
    "model.img-size": -1,
    "model.patch-size": -1,
    "model.in-chans": -1,
    "model.num-classes": 1,
    "model.width": 24,
    "model.depth": 0,
    "local.epochs": -1,
    "local.batch-size": 0,
    "local.optimizer": "adam",
    "local.lr": -1,
    "local.head-lr": -1,
    "local.prior-adjust": -1,
    "local.outliers": -1,
    "local.average": 1.1,
    "local.threads": 0,
    "upload.dtype": "bfloat16",
    "upload.extras": "counts, means",
    "data.proxy": 0.95,
    "privacy.epsilon": -1,
    "privacy.delta": 0,
    "privacy.clip": 0,
    "screen.mode": "always",
    "screen.max-images": 0,
    "krum.hostile": -1,
    "ensemble.combine": "votes",
    "ensemble.weights": "sizes",
    "inversion.route": 1.5,
    "inversion.mode": "full",
    "inversion.steps": 0,
    "inversion.batch-size": 0,
    "inversion.stops": "0.5,0.1",
    "relabel.mode": "r1",
    "distill.rounds": 0,
    "distill.images-per-round": 0,
    "distill.epochs-per-round": -1,
    "distill.init": "mean",
    "distill.extrapolate": -1,
    "distill.lr": -1,
    "evaluate.where": "nowhere",
    "evaluate.holdout": 0,
    "flower.rounds": 0,
    "flower.options": "eta=fast",
    "flower.node-wait": 0,
    "flower.upload-timeout": 0,
    "flower.quorum": 1.1,
    "flower.clients": "a | b | a",
}


@pytest.mark.parametrize(("key", "value"), BEYOND.items())
def test_each_limit_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({key: value})
    assert str(caught.value).startswith(f"{key} = ") or key == "model.patch-size"
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"data.source": "hub"}, "data.path is empty; data.source = 'hub' needs a data set's name"),
        ({"data.source": "parquet"}, "data.path is empty; data.source = 'parquet' needs a folder"),
        (
            {"model.img-size": 9, "model.patch-size": 2},
            "model.img-size = 9 is not possible; use a multiple of model.patch-size = 2",
        ),
        ({"ensemble.weights": "counts"}, "set upload.extras = 'counts'"),
        (
            {"upload.extras": "count"},
            "has 'count'; use counts, statistics, variances, moments, separated by commas",
        ),
        (
            {"model.width": 40},
            "model.width = 40 is not possible; use a multiple of 16, the width of one attention",
        ),
        (
            {"flower.options": "eta"},
            "flower.options = 'eta' is not possible; use different names with numbers",
        ),
        ({"flower.options": "eta=1, eta=2"}, "flower.options = 'eta=1, eta=2' is not possible"),
        ({"flower.options": "eta=nan"}, "flower.options = 'eta=nan' is not possible"),
        ({"data.validation": 0.5, "data.proxy": 0.5}, "data.proxy = 0.5 is not possible; use less: with"),
        (
            {"inversion.route": 0.5, "ensemble.weights": "size"},
            "inversion.route = 0.5 needs weights that tell classes apart, not ensemble.weights = 'size'; "
            "use 'estimated' or 'counts', or set inversion.route = 0",
        ),
        (
            {"data.validation": 0.2, "evaluate.where": "clients"},
            "data.validation = 0.2 is for the server, but evaluate.where = 'clients' holds images out at the clients; "
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
def test_impossible_combinations_are_told_with_the_fix(flat: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(flat)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("upload.class-counts", "upload.extras = 'counts'"),
        ("upload.directions", "upload.extras = 'moments'"),
        ("strategy.mu", "flower.options = 'proximal_mu=...'"),
        ("distill.epochs", "distill.rounds"),
        ("distill.passes", "distill.epochs-per-round"),
    ],
)
def test_an_old_spelling_is_refused_with_the_new_one(key: str, written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({key: 1})
    assert str(caught.value) == f"config key {key!r} was renamed; write {written}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"upload.class-counts": True, "upload.statistics": False, "upload.variances": False}, "counts"),
        ({"upload.class-counts": False, "upload.statistics": True, "upload.variances": True}, "variances"),
        ({"upload.class-counts": False, "upload.directions": 32}, "moments"),
        ({"upload.class-counts": True, "upload.directions": 8}, "counts"),  # which nothing here can read
        ({"upload.statistics": False}, ""),
        ({"upload.class-counts": True, "upload.statistics": True, "upload.directions": 32}, "statistics, moments"),
    ],
)
def test_old_settings_of_uploads_are_today_s_extras(old: dict[str, object], new: str) -> None:
    assert upgraded(old | {"seed": 3}) == {"seed": 3, "upload.extras": new}


@pytest.mark.parametrize(
    ("strategy", "old", "new"),
    [
        ("fedprox", {"strategy.mu": 0.0, "strategy.eta": -1.0}, "proximal_mu=0.0"),
        ("fedadam", {"strategy.eta": 0.1, "strategy.tau": 1e-05, "strategy.mu": -1.0}, "eta=0.1, tau=1e-05"),
        ("fedavgm", {"strategy.eta": 0.5, "strategy.momentum": 0.9}, "server_learning_rate=0.5, server_momentum=0.9"),
        ("qfedavg", {"strategy.lr": 0.1}, "client_learning_rate=0.1"),
        ("oneshot", {"strategy.eta": -1.0, "strategy.lr": -1.0}, ""),
    ],
)
def test_old_settings_of_strategies_are_today_s_options(strategy: str, old: dict[str, object], new: str) -> None:
    found = upgraded({"flower.strategy": strategy} | old)
    assert found == {"flower.strategy": strategy, "flower.options": new}
    builtin.check(Config.from_flat(found)) if strategy != "oneshot" else None


def test_the_head_s_old_0_is_the_rate_of_the_rest() -> None:
    assert upgraded({"local.lr": 0.01, "local.head-lr": 0.0}) == {"local.lr": 0.01, "local.head-lr": 0.01}
    assert upgraded({"local.lr": 0.01, "local.head-lr": 0.1}) == {"local.lr": 0.01, "local.head-lr": 0.1}


def test_today_s_settings_need_no_upgrade() -> None:
    assert upgraded(DEFAULTS) == DEFAULTS
    assert not RETIRED & DEFAULTS.keys()


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


def test_huge_whole_numbers_are_refused_like_other_bad_toml() -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        Config.from_toml(f"seed = {'9' * 5000}")
    assert parse_assignment(f"seed={'9' * 5000}") == ("seed", "9" * 5000)


@pytest.mark.parametrize(
    ("word", "pair"),
    [
        ("seed=3", ("seed", 3)),
        ("local.lr = 1e-3", ("local.lr", 0.001)),
        ("local.augment=false", ("local.augment", False)),
        ("model.name=vit_tiny_patch16_224", ("model.name", "vit_tiny_patch16_224")),
        ("data.path=/data/a=b", ("data.path", "/data/a=b")),
        ('data.path="3"', ("data.path", "3")),
        ("inversion.stops=0.1,0.2", ("inversion.stops", "0.1,0.2")),
        ("out-dir=", ("out-dir", "")),
        ("data.path=1\nseed=3", ("data.path", "1\nseed=3")),
        ("flower.options=eta=0.1, tau=0", ("flower.options", "eta=0.1, tau=0")),
    ],
)
def test_assignments(word: str, pair: tuple[str, object]) -> None:
    assert parse_assignment(word) == pair


@pytest.mark.parametrize("word", ["seed", "", "=3", " = 3"])
def test_words_that_are_no_assignment(word: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form key=value"):
        parse_assignment(word)


@given(text.filter(lambda value: value == value.strip()))
def test_assigned_text_arrives_unless_it_is_toml(value: str) -> None:
    key, parsed = parse_assignment(f"data.path={value}")
    assert key == "data.path"
    if type(parsed) is str and not value.startswith(('"', "'")):
        assert parsed == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = ", r"bad\.toml: not valid TOML"),
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


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config file .*none; give the path"):
        Config.from_file(tmp_path / "none")


def test_the_flower_app_has_the_same_keys_and_defaults() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table = flatten(project["tool"]["flwr"]["app"]["config"])
    fix = "run `python scripts/config_table.py`"
    assert table == DEFAULTS, fix
    assert {key: type(value) for key, value in table.items()} == {key: type(v) for key, v in DEFAULTS.items()}, fix


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_config_file_parses(path: Path) -> None:
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

"""Bench files: what they say, counted by hand, and what is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedmitr_flwr.bench.grid import cells, tune_cells
from fedmitr_flwr.bench.spec import Bench, read
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config.text import PATHS, PLACES
from fedmitr_flwr.flower.strategies import STRATEGIES
from fedmitr_flwr.report.words import measure

ROOT = Path(__file__).parents[1]

FULL = """
datasets = {digits = {}, small = {data.train-limit = 600, model.width = 32}}
methods.fedmitr-dense = {method = "fedmitr", inversion.mode = "dense"}
methods.short = {method = "flower:fedavg", rounds = [3], local.epochs = 1}
[settings]
local.epochs = 2
[grid]
partition = ["dirichlet", "classes-per-client", "iid"]
alpha = [0.1, 0.5]
classes = [2]
clients = [5, 10]
seed = [0, 1]
rounds = [1, 10]
methods = ["fedavg", "fedmitr", "fedmitr-dense", "flower:fedadam", "short"]
[tune]
seed = 100
alpha = 0.5
clients = 10
[tune.methods."flower:fedadam"]
flower.options = ["eta=0.001, tau=0.01", "eta=0.01, tau=0.01", "eta=0.1, tau=0.01"]
local.lr = [0.01, 0.1]
"""


def put(folder: Path, text: str) -> Path:
    (folder / "bench.toml").write_text(text)
    return folder / "bench.toml"


@pytest.fixture
def full(tmp_path: Path) -> Bench:
    return read(put(tmp_path, FULL))


def test_the_cells_are_counted_by_hand_and_have_the_settings_of_their_place(full: Bench, tmp_path: Path) -> None:
    made = cells(full)
    found = {
        (each.data, each.skew.name, each.clients, each.seed, each.label, each.rounds): each.config for each in made
    }
    # 2 seeds x 2 data sets x 2 K x (2 alphas + 2 classes + IID) x (3 one-shot + 2 rounds of FedAdam + 1 of `short`)
    assert len(made) == len(found) == 2 * 2 * 2 * 4 * 6
    assert [cell.seed for cell in made] == sorted(cell.seed for cell in made)  # seeds are whole
    assert {cell.skew.name for cell in made} == {"Dirichlet 0.1", "Dirichlet 0.5", "2 classes", "IID"}
    of_flower = {(cell.label, cell.rounds) for cell in made if cell.variant.flower}
    assert of_flower == {("flower:fedadam", 1), ("flower:fedadam", 10), ("short", 3)}

    dense = found["small", "2 classes", 10, 1, "fedmitr-dense", 1]
    assert (dense.method, dense.inversion.mode, dense.seed, dense.partition.clients) == ("fedmitr", "dense", 1, 10)
    assert (dense.partition.scheme, dense.partition.classes_per_client) == ("classes-per-client", 2)
    assert (dense.data.train_limit, dense.model.width, dense.local.epochs) == (600, 32, 2)
    adam = found["digits", "Dirichlet 0.1", 5, 0, "flower:fedadam", 10]
    assert (adam.flower.strategy, adam.flower.rounds, adam.partition.alpha) == ("fedadam", 10, 0.1)
    assert found["digits", "IID", 5, 0, "short", 3].local.epochs == 1

    # uploads are shared by what decides them only
    assert len({cell.group for cell in made if not cell.variant.flower}) == 2 * 2 * 2 * 4
    assert len({cell.key for cell in made}) == len(made)
    some = [read(put(tmp_path, FULL), {"device": device, "grid.methods": ["fedavg"]}) for device in ("cpu", "cuda")]
    assert len({cells(bench)[0].group for bench in some}) == 2
    assert {cell.config.screen.mode for cell in made} == {"off"}  # or they were screened again for every method
    other = cells(read(put(tmp_path, FULL), {"inversion.steps": 7}))  # which Flower's strategies do not read
    same = {before.variant.flower for before, after in zip(made, other, strict=True) if before.key == after.key}
    assert same == {True}


def test_tuning_is_at_its_own_place_on_validation_images(full: Bench) -> None:
    tried = tune_cells(full)  # 2 data sets x 2 rounds, 6 settings each
    places = {(data, "flower:fedadam", rounds) for data in ("digits", "small") for rounds in (1, 10)}
    assert {place: len(pairs) for place, pairs in tried.items()} == dict.fromkeys(places, 6)
    flat, cell = tried["digits", "flower:fedadam", 10][0]
    assert flat == {"flower.options": "eta=0.001, tau=0.01", "local.lr": 0.01}
    assert (cell.seed, cell.clients, cell.skew.name, cell.rounds) == (100, 10, "Dirichlet 0.5", 10)
    assert (cell.config.data.validation, cell.config.flower.options) == (0.2, "eta=0.001, tau=0.01")
    assert cell.name.startswith("tuning: ")
    assert all(cell.config.data.validation == 0 for cell in cells(full))


def test_a_whole_grid_may_be_judged_by_validation_images(tmp_path: Path) -> None:
    text = "[settings]\ndata.validation = 0.2\n[grid]\nmethods = ['fedavg', 'central']\n[methods.central]"
    made = cells(read(put(tmp_path, text), {"data.flip": True}))
    assert {cell.config.data.validation for cell in made} == {0.2}
    assert {measure(cell.config.to_flat()) for cell in made} == {"Validation accuracy"}


def test_a_data_set_may_have_places_of_its_own(tmp_path: Path) -> None:
    text = "[datasets.a]\nplaces = [{alpha = 0.05, clients = 7}, {classes = 2, clients = 3}, {}]\n[datasets.b]\n"
    text += "[grid]\nclients = [4]\nseed = [1, 2]\nmethods = ['fedavg']"
    made = [(cell.seed, cell.data, cell.clients, cell.skew.name) for cell in cells(read(put(tmp_path, text)))]
    own = [("a", 7, "Dirichlet 0.05"), ("a", 3, "2 classes"), ("a", 5, "IID"), ("b", 4, "Dirichlet 0.3")]
    assert made == [(seed, *place) for seed in (1, 2) for place in own]


def test_axes_that_no_data_set_reads_are_refused(tmp_path: Path) -> None:
    text = "[datasets.a]\nplaces = [{alpha = 0.05}]\n[grid]\nmethods = ['fedavg']\n"
    with pytest.raises(ConfigError, match=r"grid\.clients is not read by data sets with places .* \(a\); remove it"):
        read(put(tmp_path, text + "clients = [5]"))
    both = put(tmp_path, text.replace("[grid]", "[datasets.b]\n[grid]") + "clients = [5]")
    assert len(cells(read(both))) == 2
    with pytest.raises(ConfigError, match=r"grid\.alpha is not read by .* \(a\); remove it"):
        read(both, {"grid.alpha": [0.1]})
    assert len(cells(read(both, {"grid.alpha": [0.1], "grid.data": ["b"]}))) == 1


def test_what_was_chosen_is_set(full: Bench) -> None:
    choice = {"chosen": {"flower.options": "eta=0.1"}, "tried": []}
    made = cells(full, {("small", "flower:fedadam", 10): choice})
    tuned = [cell for cell in made if cell.config.flower.options == "eta=0.1"]
    assert {(cell.data, cell.label, cell.rounds) for cell in tuned} == {("small", "flower:fedadam", 10)}
    assert len(tuned) == 2 * 2 * 4
    assert all(cell.facts["tuned"] == choice for cell in tuned)


def test_a_method_is_told_what_it_asks_for(tmp_path: Path) -> None:
    text = '[grid]\nmethods = ["fedmitr", "lda", "fedpft", "counts", "regmean"]\n'
    text += '[methods.counts]\nmethod = "fedmitr"\nensemble.weights = "counts"'
    made = cells(read(put(tmp_path, text)))
    told = {"fedmitr": "", "lda": "statistics", "fedpft": "variances", "counts": "counts", "regmean": "moments"}
    assert {cell.label: cell.config.upload.extras for cell in made} == told
    assert len({cell.group for cell in made}) == 1
    # a data set's settings may be those of FedMITR with more: its rivals are told less, and RegMean what it needs
    text = '[settings]\nupload.extras = "counts"\n[grid]\nmethods = ["fedmitr", "regmean"]\n'
    assert [cell.config.upload.extras for cell in cells(read(put(tmp_path, text)))] == ["counts", "moments"]


def test_words_of_the_command_line_win(tmp_path: Path) -> None:
    path = put(tmp_path, FULL)
    bench = read(path, {"grid.seed": [7], "tune.seed": 8, "local.epochs": 9, "model.width": 16})
    assert bench.tune is not None
    assert bench.tune.seed == 8
    made = cells(bench)
    assert {(cell.seed, cell.config.local.epochs, cell.config.model.width) for cell in made} == {(7, 9, 16)}
    # a part of the methods needs no tables of the others
    bench = read(path, {"grid.methods": ["fedmitr", "short"]})
    assert {(cell.label, cell.rounds) for cell in cells(bench)} == {("fedmitr", 1), ("short", 3)}
    assert tune_cells(bench) == {}
    # what is chosen would win over the word
    own: dict[str, object] = {"flower.options": "eta=0.5"}
    with pytest.raises(ConfigError, match=r'options is set .* \[tune\.methods\."flower:fedadam"\] tries values'):
        read(path, own)
    assert read(path, {**own, "grid.methods": ["short"]}).last == own
    # a part of the partitions needs no numbers of the others
    for part, names in (["dirichlet"], ["Dirichlet 0.1", "Dirichlet 0.5"]), (["iid"], ["IID"]):
        words = {"grid.partition": part, "grid.methods": ["fedmitr"]}
        assert [skew.name for clients, skew in read(path, words).places["small"] if clients == 5] == names
    with pytest.raises(ConfigError, match=r"grid\.classes is for 'classes-per-client'"):
        read(path, {"grid.partition": ["dirichlet"], "grid.classes": [3]})


def test_settings_of_all_go_before_a_data_set_s_file_and_its_own_before_both(tmp_path: Path) -> None:
    """A base file gives settings, but no axes of the grid."""
    base = "seed = 5\nmethod = 'fedavg'\npartition.alpha = 0.7\n"
    base += "local.epochs = 4\nlocal.lr = 0.1\nmodel.width = 16\ndistill.epochs-per-round = 9\n"
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "small.toml").write_text("local.epochs = 5\nlocal.lr = 0.2\nmodel.width = 32\n")
    text = 'base = "base.toml"\n[settings]\nlocal.epochs = 6\nlocal.lr = 0.3\n[datasets.a]\nconfig = "small.toml"\n'
    (only,) = cells(
        read(put(tmp_path, text + 'local.lr = 0.4\nscreen.mode = "exclude"\n[grid]\nmethods = ["fedmitr"]'))
    )
    config = only.config
    assert (config.local.epochs, config.local.lr) == (6, 0.4)
    assert (config.model.width, config.distill.epochs_per_round, config.screen.mode) == (32, 9, "exclude")
    assert (config.seed, config.method, config.partition.alpha) == (0, "fedmitr", 0.3)


def test_a_setting_that_there_was_not_yet_counts_as_its_default(tmp_path: Path) -> None:
    text = "[grid]\nmethods = ['fedmitr']\n[settings]\n"
    (same,), (other,) = (cells(read(put(tmp_path, text + more))) for more in ("", "local.outliers = 0.5"))
    before = {name: value for name, value in same.config.to_flat().items() if name != "local.outliers"}
    assert same.is_of(before)
    assert not other.is_of(before)
    assert not same.is_of(before | {"local.lr": 0.5})


# What can be told from the file alone, and from its cells. In the texts `#` is a grid of one method.
ONE = "[grid]\nmethods = ['fedavg']\n"
WRONG = [
    ("[grid]\nalhpa = [0.1]", "unknown key 'grid.alhpa'; did you mean grid.alpha?"),
    ("[grid]\nmethods = ['fedmitre']", "grid.methods: 'fedmitre' is unknown; did you mean fedmitr?"),
    ("[grid]\nmethods = []", "grid.methods = [] is not possible; use a list with one entry at least"),
    ("[grid]\nmethods = ['fedavg', 'fedavg']", "has an entry twice"),
    ("#seed = [-1]", "grid.seed: -1 is not possible; use whole numbers >= 0"),
    ("#seed = 1", "grid.seed = 1 is not possible; use a list"),
    ("#alpha = [0]", "grid.alpha: 0 is not possible; use numbers > 0"),
    ("#classes = [2]", "grid.classes is for 'classes-per-client', which is not in"),
    ("#partition = ['iidd']", "grid.partition: 'iidd' is unknown; did you mean iid?"),
    ("#data = ['cifar']", "describe it in a table [datasets.cifar]"),
    ("#[settings]\nseed = 3", "settings: seed is an axis of the grid; set it in [grid]"),
    ("#[settings]\nmethod = 'adi'", "settings: method is what the bench decides"),
    ("#[settings]\nlr = 0.1", "settings: unknown config key 'lr'; did you mean local.lr"),
    ("#[settings]\ndata.validation = 0.2\n[tune]", "data.validation = 0.2, but [tune] chooses on validation images"),
    ("#[methods.fedavg]\ndata.validation = 0.2", "methods.fedavg: all methods are judged by the same images; set"),
    ("#[methods.adi]", "[methods.adi] is not in grid.methods; add it there"),
    ("#[methods.fedavg]\nrounds = [2]", "fedavg is one shot; only Flower's own"),
    ("#[tune]\nseed = 0", "tune.seed = 0 is in grid.seed as well"),
    ("#[tune]\n[tune.methods.adi]\n", "tune.methods.adi: 'adi' is unknown"),
    ("reference = 'fedavgm'\n#", "reference: 'fedavgm' is unknown; did you mean fedavg?; it must be in"),
    ("keep = 'none'\n#", "keep: 'none' is unknown; use one of: all, results"),
    ("[datasets.a]\nplaces = [{alpha = 0.1, classes = 2}]\n#", "has both alpha and classes; remove one"),
    ("[datasets.a]\nplaces = [{beta = 0.1}]\n#", "unknown key 'datasets.a.places.beta'"),
    ("[datasets.a]\nplaces = [{alpha = 0}]\n#", "datasets.a.places.alpha: 0 is not possible"),
    ("[datasets.a]\nplaces = 3\n#", "datasets.a.places = 3 is not possible; use a list"),
    ("[datasets.a]\nplaces = [3]\n#", "datasets.a.places = 3 is not possible; make it a table"),
    ("grid = 1", "grid = 1 is not possible; make it a table [grid]"),
    ("[grid\n", "not valid TOML"),
    ("seed = 1\n[local]\nlr = 0.1", "is a file of settings and no bench file; run it by: fedmitr run -c"),
    ("\ufeff[grid]\nmethods = ['fedmedain']", "did you mean fedmedian?"),
]
WRONG_CELL = [
    ("#[methods.fedavg]\nlocal.epochs = 3", "local.epochs of 'fedavg' changes the uploads"),
    ("[grid]\nmethods = ['feddf']", "feddf"),
    ("#[settings]\nevaluate.where = 'clients'", "a bench evaluates on the server"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(put(tmp_path, text.replace("#", ONE)))
    assert message in str(caught.value)
    assert "bench.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_run_is_known_before_anything_runs(tmp_path: Path) -> None:
    for text, message in WRONG_CELL:
        with pytest.raises(ConfigError, match=message):
            cells(read(put(tmp_path, text.replace("#", ONE))))


def test_uploads_of_its_own_are_a_method_s_that_says_so(tmp_path: Path) -> None:
    text = '[grid]\nmethods = ["fedmitr", "plain"]\n[methods.plain]\nmethod = "fedmitr"\nlocal.outliers = 0.0\n'
    with pytest.raises(ConfigError, match=r"local\.outliers of 'plain' changes the uploads .*: own-uploads = true"):
        cells(read(put(tmp_path, text)))
    shared, own = cells(read(put(tmp_path, text + "own-uploads = true")))
    assert (shared.config.local.outliers, own.config.local.outliers) == (1.0, 0.0)
    assert shared.group != own.group
    with pytest.raises(ConfigError, match=r"methods\.plain\.own-uploads = 1 is not possible; use true or false"):
        read(put(tmp_path, text + "own-uploads = 1"))


def test_the_names_of_flower_s_strategies_are_those_of_the_app() -> None:
    from server_app import builtin

    assert set(STRATEGIES) == set(builtin.STRATEGIES)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "bench").glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_can_be_expanded(path: Path) -> None:
    bench = read(path)
    bench = replace(bench, seeds=bench.seeds[:1])  # the others are alike
    made = cells(bench)
    one_shot = sum(not variant.flower for variant in bench.variants)
    rounds = sum(len(variant.rounds) for variant in bench.variants if variant.flower)
    assert len(made) == sum(map(len, bench.places.values())) * (one_shot + rounds)
    assert bench.reference in {variant.label for variant in bench.variants}
    assert len({cell.key for cell in made}) == len(made)
    tuned = bench.tune.tried if bench.tune else ()
    assert all(variant.label in tuned for variant in bench.variants if variant.label == "flower:fedadam")
    settings = {tuple(sorted(cell.config.to_flat().items())) for cell in made}
    assert len(settings) == len(made)  # no two labels are the same method under the same settings


def test_a_bench_s_paths_are_relative_to_the_file_that_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bench/proxy", "base", "here"):
        (tmp_path / folder).mkdir(parents=True)
    sizes = "model.img-size = 8\nmodel.patch-size = 2\nmodel.in-chans = 1\nmodel.num-classes = 2\n"  # no look at images
    (tmp_path / "base/base.toml").write_text(f"model.weights = 'w.safetensors'\nout-dir = 'runs'\n{sizes}")
    (tmp_path / "base/data.toml").write_text("data.source = 'parquet'\ndata.path = 'images'\n")
    (tmp_path / "bench/b.toml").write_text(
        "base = '../base/base.toml'\n[settings]\nlocal.batch_size = 8\n"
        "[datasets.d]\nconfig = '../base/data.toml'\n[grid]\nmethods = ['feddf']\n"
        "[methods.feddf]\nfeddf.path = 'proxy'\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    for words, images in ({}, "base/images"), ({"data.path": "other"}, "here/other"):
        (cell,) = cells(read(Path("../bench/b.toml"), words))
        assert {key: cell.config.to_flat()[key] for key in PATHS if key not in PLACES} == {
            "data.path": str(tmp_path / images),
            "feddf.path": str(tmp_path / "bench/proxy"),
            "model.weights": str(tmp_path / "base/w.safetensors"),
        }
        assert cell.config.local.batch_size == 8

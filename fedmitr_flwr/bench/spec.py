"""A bench file, parsed once: which cells there are to run, on what, and how some settings are chosen.

The file's form is described in docs/benchmark.md. Settings are those of any run; what the grid decides cannot be set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from ..common.outside import is_file
from ..config import Config
from ..config.text import flatten, located, read_document, read_flat, typed
from ..flower.strategies import STRATEGIES
from .checked import as_list, as_number, as_numbers, as_table, as_text, as_texts, quoted, require_known, require_one_of

Flat = Mapping[str, object]

FLOWER = "flower:"  # before the name of a strategy that Flower ships
CENTRAL = "central"  # no method, but a ceiling: one model on all images
SCHEMES = ("dirichlet", "classes-per-client", "iid")
_NUMBERS = {"alpha": "dirichlet", "classes": "classes-per-client"}  # the axis of a scheme
_GRIDS = {  # settings that are axes, by what they are called there
    "seed": "seed",
    "partition.scheme": "partition",
    "partition.alpha": "alpha",
    "partition.classes-per-client": "classes",
    "partition.clients": "clients",
}
_OURS = ("method", "out-dir", "resume-from", "flower.strategy", "flower.rounds")
_VALIDATION = "data.validation"  # for all cells, or for what is tuned, but of no single method
_TOP = ("name", "base", "reference", "keep", "client-gpus", "settings", "datasets", "grid", "methods", "tune")
_KNOWN = Config().to_flat()
_TABLES = ("grid", "tune")  # of which the command line can set keys
_AXES = ("data", "partition", "alpha", "classes", "clients", "seed", "rounds", "methods")
_PLACE = ("alpha", "classes", "clients")
_PLACES = ("partition", *_PLACE)
_TUNE = ("seed", "validation", "partition", "alpha", "classes", "clients", "methods")


@dataclass(frozen=True)
class Skew:
    """How the images are spread: a scheme with its one number."""

    scheme: str
    value: float | None = None  # alpha, or classes per client

    @property
    def name(self) -> str:
        if self.scheme == "iid":
            return "IID"
        return f"Dirichlet {self.value:g}" if self.scheme == "dirichlet" else f"{self.value:g} classes"

    @property
    def settings(self) -> dict[str, object]:
        own = {"dirichlet": "partition.alpha", "classes-per-client": "partition.classes-per-client"}
        number = {own[self.scheme]: self.value} if self.scheme in own else {}
        return {"partition.scheme": self.scheme, **number}


Place = tuple[int, Skew]  # how many clients there are, and how the images are spread over them


@dataclass(frozen=True)
class Variant:
    """A method under its label, with settings of its own."""

    label: str
    method: str  # a file of fedmitr_flwr/methods, or, with `flower`, one of Flower's strategies
    flower: bool
    rounds: tuple[int, ...]
    settings: Flat = field(hash=False)
    own_uploads: bool = False  # may its settings change how clients train?

    @property
    def is_method(self) -> bool:
        """Whether it is a file of fedmitr_flwr/methods, and works on uploads."""
        return not self.flower and self.method != CENTRAL


@dataclass(frozen=True)
class Tune:
    """Settings that are chosen on validation images, at one place of the grid with a seed of its own."""

    seed: int
    validation: float
    skew: Skew
    clients: int
    tried: Mapping[str, tuple[Flat, ...]]  # by label, in the order of trying


@dataclass(frozen=True)
class Bench:
    """Everything that a bench file says."""

    name: str
    reference: str  # the label that the others are tested against
    keep: str
    client_gpus: float
    data: Mapping[str, Flat]  # by name, all settings that a data set has
    places: Mapping[str, tuple[Place, ...]]  # of each data set
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    tune: Tune | None
    last: Flat = field(default_factory=dict)  # of the command line; they win


def read(path: Path, words: Flat | None = None) -> Bench:
    """Parse a bench file, under the `words` of the command line: settings, `grid.seed=[100]` or `tune.seed=200`.

    Raises:
        ConfigError: a key is unknown, or a value is not possible. File and key are named.
    """
    document = read_document(path, "bench file")
    if not set(document) & {"base", "settings", "datasets", "grid", "methods"} and set(flatten(document)) & set(_KNOWN):
        raise ConfigError(f"{path} is a file of settings and no bench file; run it by: fedmitr run -c {path}")
    try:
        if "reference" in document:
            labels = as_texts(as_table(document.get("grid", {}), "grid").get("methods", []), "grid.methods")
            reference = as_text(document["reference"], "reference")
            require_one_of(reference, labels, "reference", "; it must be in grid.methods")
        words = words or {}
        last = dict(words)
        for name in _TABLES:
            own = {key.removeprefix(f"{name}."): last.pop(key) for key in list(last) if key.startswith(f"{name}.")}
            if own or name == "grid":
                document[name] = {**as_table(document.get(name, {}), name), **own}
        if "grid.methods" in words:  # a part of them: what the file says of the others is not needed
            _keep_only(document["grid"]["methods"], document, document.get("tune"))
        schemes = document["grid"].get("partition")
        if "grid.partition" in words and isinstance(schemes, list):  # the others' numbers are not needed either
            for axis, scheme in _NUMBERS.items():
                if f"grid.{axis}" not in words and scheme not in schemes:
                    document["grid"].pop(axis, None)
        return _bench(document, path, last, [axis for axis in _PLACES if f"grid.{axis}" in words])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _keep_only(labels: object, *tables: object) -> None:
    for table in tables:
        if isinstance(table, dict) and isinstance(table.get("methods"), dict) and isinstance(labels, list):
            table["methods"] = {label: own for label, own in table["methods"].items() if label in labels}


def _bench(document: Mapping[str, Any], path: Path, last: Flat, narrowed: Sequence[str]) -> Bench:
    """`narrowed` are the axes of places that the command line gave."""
    require_known(document, _TOP, "")
    axes = document["grid"]
    require_known(axes, _AXES, "grid.")
    tables = as_table(document.get("datasets", {}), "datasets") or {"digits": {}}
    data = _data(tables, document, path, last)
    chosen = as_texts(axes.get("data", list(data)), "grid.data")
    for name in chosen:
        require_one_of(name, data, "grid.data", f"; describe it in a table [datasets.{name}]")
    sources = {{**data[name], **last}.get("data.source", "") for name in chosen}
    last = _settings(last, "the command line", Path.cwd(), sources.pop() if len(sources) == 1 else "hub")
    skews = _skews(axes, "grid")
    clients = as_numbers(axes.get("clients", [5]), "grid.clients", int, 2)
    own = {name: _own_places(as_table(tables[name], f"datasets.{name}"), f"datasets.{name}") for name in chosen}
    places = {name: own[name] or tuple(product(clients, skews)) for name in chosen}
    unread = [*(narrowed if any(own.values()) else ()), *(axes if all(own.values()) else ())]
    for axis in _PLACES:
        if axis in unread:
            names = ", ".join(name for name in chosen if own[name])
            raise ConfigError(f"grid.{axis} is not read by data sets with places of their own ({names}); remove it")
    seeds = as_numbers(axes.get("seed", [0]), "grid.seed", int, 0)
    variants = _variants(axes, as_table(document.get("methods", {}), "methods"), path.parent)
    tune = _tune(document["tune"], variants, skews, clients, seeds, path.parent) if "tune" in document else None
    if tune:
        for label, tried in tune.tried.items():  # what is chosen would win over what the command line says
            if twice := [key for key in tried[0] if key in last]:
                raise ConfigError(
                    f"{twice[0]} is set on the command line, and [tune.methods.{quoted(label)}] tries values of it; "
                    "remove one of the two"
                )
        for name in chosen:
            if value := {**data[name], **last}.get(_VALIDATION):
                raise ConfigError(
                    f"{_VALIDATION} = {value}, but [tune] chooses on validation images and reports on test images; "
                    f"remove {_VALIDATION}, or the table [tune]"
                )
    return Bench(
        name=as_text(document.get("name", path.stem), "name"),
        reference=as_text(document.get("reference", "fedmitr"), "reference"),
        keep=require_one_of(as_text(document.get("keep", "all"), "keep"), ("all", "results"), "keep"),
        client_gpus=as_number(document.get("client-gpus", 0.0), "client-gpus", float, 0),
        data={name: data[name] for name in chosen},
        places=places,
        seeds=seeds,
        variants=variants,
        tune=tune,
        last=last,
    )


def _data(tables: Mapping[str, Any], document: Mapping[str, Any], path: Path, last: Flat) -> dict[str, Flat]:
    """The settings of each data set: the file's base, under its own config file, under [settings], under its own."""
    base = _of_file(document.get("base", ""), "base", path)
    settings = flatten(as_table(document.get("settings", {}), "settings"))
    data: dict[str, Flat] = {}
    for name, table in tables.items():
        own = flatten(as_table(table, f"datasets.{name}"))
        own.pop("places", None)
        file = _of_file(own.pop("config", ""), "config", path)
        source = {"data.source": "", **base, **file, **settings, **own, **last}["data.source"]
        data[name] = {
            **located(base, _folder(document.get("base", ""), path), source),
            **located(file, _folder(table.get("config", ""), path), source),
            **_settings(settings, "settings", path.parent, source),
            **_settings(own, f"datasets.{name}", path.parent, source),
        }
    return data


def _own_places(table: Mapping[str, Any], where: str) -> tuple[Place, ...]:
    """Those that a data set names itself, in place of the grid's: `places = [{alpha = 0.05, clients = 7}, ...]`."""
    found: list[Place] = []
    for place in as_list(table["places"], f"{where}.places") if "places" in table else ():
        axes = as_table(place, f"{where}.places")
        require_known(axes, _PLACE, f"{where}.places.")
        if axes.keys() >= _NUMBERS.keys():
            raise ConfigError(f"{where}.places: {place!r} has both alpha and classes; remove one")
        clients = as_number(axes.get("clients", 5), f"{where}.places.clients", int, 2)
        skew = Skew("iid")
        if "alpha" in axes:
            skew = Skew("dirichlet", as_number(axes["alpha"], f"{where}.places.alpha", float, 0, open_end=True))
        elif "classes" in axes:
            skew = Skew("classes-per-client", as_number(axes["classes"], f"{where}.places.classes", int, 1))
        found.append((clients, skew))
    return tuple(found)


def _skews(axes: Mapping[str, Any], where: str) -> tuple[Skew, ...]:
    values: dict[str, Sequence[float | None]] = {
        "dirichlet": as_numbers(axes.get("alpha", [0.3]), f"{where}.alpha", float, 0, open_end=True),
        "classes-per-client": as_numbers(axes.get("classes", [2]), f"{where}.classes", int, 1),
        "iid": [None],
    }
    schemes = as_texts(axes.get("partition", ["dirichlet"]), f"{where}.partition")
    for scheme in schemes:
        require_one_of(scheme, SCHEMES, f"{where}.partition")
    for axis, scheme in _NUMBERS.items():
        if axis in axes and scheme not in schemes:
            raise ConfigError(
                f"{where}.{axis} is for {scheme!r}, which is not in {where}.partition; add it or remove it"
            )
    return tuple(Skew(scheme, value) for scheme in schemes for value in values[scheme])


def _variants(axes: Mapping[str, Any], tables: Mapping[str, Any], folder: Path) -> tuple[Variant, ...]:
    from ..methods import available

    rounds = as_numbers(axes.get("rounds", [1]), "grid.rounds", int, 1)
    labels = as_texts(axes.get("methods", []), "grid.methods")
    if unused := [label for label in tables if label not in labels]:
        raise ConfigError(f"[methods.{quoted(unused[0])}] is not in grid.methods; add it there or remove the table")
    variants = []
    for label in labels:
        where = f"methods.{quoted(label)}"
        flat = flatten(as_table(tables.get(label, {}), where))
        method = as_text(flat.pop("method", label), f"{where}.method")
        flower = method.startswith(FLOWER)
        own = as_numbers(flat.pop("rounds", list(rounds if flower else [1])), f"{where}.rounds", int, 1)
        known = [FLOWER + name for name in STRATEGIES] if flower else [*available(), CENTRAL]
        if is_file(method):
            method = str(located({"method": method}, folder.absolute())["method"])
        else:
            require_one_of(method, known, f"{where}.method" if label in tables else "grid.methods")
        if not flower and own != (1,):
            raise ConfigError(f"{where}.rounds = {list(own)}, but {method} is one shot; only Flower's own have rounds")
        own_uploads = flat.pop("own-uploads", False)
        if not isinstance(own_uploads, bool):
            raise ConfigError(f"{where}.own-uploads = {own_uploads!r} is not possible; use true or false")
        settings = _settings(flat, where, folder)
        variants.append(Variant(label, method.removeprefix(FLOWER), flower, own, settings, own_uploads))
    return tuple(variants)


def _tune(
    given: object,
    variants: Sequence[Variant],
    skews: Sequence[Skew],
    clients: Sequence[int],
    seeds: Sequence[int],
    folder: Path,
) -> Tune:
    table = dict(as_table(given, "tune"))
    require_known(table, _TUNE, "tune.")
    seed = as_number(table.get("seed", 100), "tune.seed", int, 0)
    if seed in seeds:
        raise ConfigError(f"tune.seed = {seed} is in grid.seed as well; choose on a seed that is not reported")
    validation = as_number(table.get("validation", 0.2), "tune.validation", float, 0, open_end=True)
    single: dict[str, Any] = {key: [table[key]] for key in ("partition", "alpha", "classes") if key in table}
    skew = _skews(single, "tune")[0] if single else skews[0]
    tried = {}
    for label, axes in as_table(table.get("methods", {}), "tune.methods").items():
        where = f"tune.methods.{quoted(label)}"
        require_one_of(label, [variant.label for variant in variants], where, "; it must be in grid.methods")
        flat = {key: as_list(values, f"{where}.{key}") for key, values in flatten(as_table(axes, where)).items()}
        combinations = [dict(zip(flat, values, strict=True)) for values in product(*flat.values())]
        tried[label] = tuple(_settings(one, where, folder) for one in combinations)
    wanted = as_number(table.get("clients", clients[0]), "tune.clients", int, 2)
    return Tune(seed, validation, skew, wanted, tried)


def _of_file(value: object, key: str, path: Path) -> Flat:
    """The settings of the config file that the bench file `path` names; none, if it names none."""
    file = as_text(value, key)
    ours = {*_GRIDS, *_OURS, _VALIDATION}  # a file for single runs has them too
    return {key: value for key, value in read_flat(path.parent / file).items() if key not in ours} if file else {}


def _folder(file: str, path: Path) -> Path:
    """Of the config file that the bench file `path` names."""
    return (path.parent / file).absolute().parent


def _settings(flat: Flat, where: str, folder: Path, source: object = "hub") -> Flat:
    """Settings as a config has them: known keys that a bench may set, typed values, and paths that are absolute."""
    for key in flat:
        if key in _GRIDS:
            raise ConfigError(
                f"{where}: {key} is an axis of the grid; set it in [grid], or by grid.{_GRIDS[key]}=[...]"
            )
        if key in _OURS:
            raise ConfigError(f"{where}: {key} is what the bench decides; remove it")
        if key == _VALIDATION and where.startswith(("methods.", "tune.")):
            raise ConfigError(f"{where}: all methods are judged by the same images; set {key} in [settings]")
    try:
        return located({key: typed(key, value, _KNOWN) for key, value in flat.items()}, folder.absolute(), source)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error

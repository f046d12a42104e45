"""From a bench file to its cells: each one run, with its whole config and a place of its own on disk."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from .. import methods
from ..common.errors import ConfigError
from ..config import Config, recipe
from ..config.earlier import upgraded
from ..config.sections import EXTRAS
from ..config.text import PATHS, PLACES
from ..pipeline import NARROWABLE, UPLOAD_SETTINGS
from ..resolve import resolve
from .spec import Bench, Flat, Skew, Variant

# Extras beside the weights, to be tried in this order: each method is given the first that it can do with.
EXTRAS_LADDER: list[Flat] = [{}, *({"upload.extras": one} for one in ("counts", "statistics", "variances", "moments"))]
ALL_EXTRAS: Flat = {"upload.extras": ", ".join(EXTRAS)}  # what is uploaded
# Screening looks at uploads before any method does: equal uploads, equal findings, and its seconds are no method's.
DEFAULTS: Flat = {"screen.mode": "off"}
_KNOWN = recipe.settled(Config()).to_flat()


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    data: str
    skew: Skew
    clients: int
    seed: int
    variant: Variant
    rounds: int
    config: Config = field(repr=False)
    tuned: Mapping[str, object] | None = field(default=None, hash=False, repr=False)  # what was tried, and the choice
    # Of a run on validation images, to choose settings:
    tried: Flat | None = field(default=None, hash=False, repr=False)

    @property
    def label(self) -> str:
        return self.variant.label

    @property
    def name(self) -> str:
        """For people: `digits, Dirichlet 0.3, K 5, seed 0, fedmitr`."""
        rounds = f", {self.rounds} round{'s' * (self.rounds > 1)}" if self.variant.flower else ""
        where = f"{self.data}, {self.skew.name}, K {self.clients}, seed {self.seed}"
        tried = ", ".join(f"{key} = {value}" for key, value in (self.tried or {}).items())
        return f"tuning: {where}, {self.label}{rounds}, {tried}" if tried else f"{where}, {self.label}{rounds}"

    @cached_property
    def group(self) -> str:
        """The folder of its uploads: equal for all cells whose clients train alike."""
        decisive = {
            key: value
            for key, value in self._decides.items()
            if key == "device" or (key.startswith(UPLOAD_SETTINGS) and key not in NARROWABLE)
        }
        return f"{_slug(self.data)}-{_slug(self.skew.name)}-K{self.clients}-s{self.seed}.{_hash(decisive)}"

    @cached_property
    def folder(self) -> str:
        rounds = f"-r{self.rounds}" if self.variant.flower else ""
        return f"{_slug(self.label)}{rounds}.{_hash(self._decides)}"

    @property
    def key(self) -> str:
        """Equal for cells that are the same run; good as the name of a file."""
        return f"{self.group}--{self.folder}"

    def is_of(self, settings: Mapping[str, object], but: tuple[str, ...] = ()) -> bool:
        """Whether a run with these settings is this cell; paths may be written otherwise, and are in `folder`.

        Settings that begin like one of `but` may be others. One that there was not yet counts as today's default.
        """
        own, unread = self.in_force, methods.SERVER_PHASE if self.variant.flower else ()
        compared = [key for key in own if not key.startswith((*PATHS, *PLACES, *but, *unread))]
        theirs = upgraded(settings)
        return all(theirs.get(key, _KNOWN[key]) == own[key] for key in compared)

    @cached_property
    def in_force(self) -> Flat:
        """The settings that its result has."""
        return (methods.in_force(self.config) if self.variant.is_method else self.config).to_flat()

    @cached_property
    def _decides(self) -> Flat:
        return {key: value for key, value in self.config.to_flat().items() if key not in PLACES}

    @property
    def facts(self) -> dict[str, object]:
        """What the tables need to know of its place in the grid."""
        return {
            "data": self.data,
            "partition": self.skew.name,
            "scheme": self.skew.scheme,
            "value": self.skew.value,
            "clients": self.clients,
            "seed": self.seed,
            "label": self.label,
            "kind": "flower" if self.variant.flower else "one-shot",
            "rounds": self.rounds,
            "tuning": self.tried is not None,
            "tuned": self.tuned,
        }


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


def _hash(settings: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def cells(bench: Bench, choices: Mapping[tuple[str, str, int], Flat] | None = None) -> list[Cell]:
    """All cells, seed by seed, so that a grid that is stopped early has whole seeds; equal uploads lie together.

    `choices` of `tune_cells` are by (data, label, rounds): `{"chosen": settings, "tried": [...]}`.

    Raises:
        ConfigError: a cell has an impossible setting. Cell and key are named.
    """
    made = []
    for seed, data in product(bench.seeds, bench.data):
        for (clients, skew), variant in product(bench.places[data], bench.variants):
            for rounds in variant.rounds:
                tuned = (choices or {}).get((data, variant.label, rounds))
                chosen: Flat = tuned["chosen"] if tuned else {}  # type: ignore[assignment]
                config = _config(bench, data, skew, clients, seed, variant, rounds, chosen)
                made.append(Cell(data, skew, clients, seed, variant, rounds, config, tuned))
    return made


def tune_cells(bench: Bench) -> dict[tuple[str, str, int], list[tuple[Flat, Cell]]]:
    """What is tried on validation images, by (data, label, rounds): pairs of settings and cell."""
    tune = bench.tune
    if tune is None:
        return {}
    made: dict[tuple[str, str, int], list[tuple[Flat, Cell]]] = {}
    for data, variant in product(bench.data, bench.variants):
        for rounds, tried in product(variant.rounds, tune.tried.get(variant.label, ())):
            judged = {**tried, "data.validation": tune.validation}
            config = _config(bench, data, tune.skew, tune.clients, tune.seed, variant, rounds, judged)
            cell = Cell(data, tune.skew, tune.clients, tune.seed, variant, rounds, config, tried=tried)
            made.setdefault((data, variant.label, rounds), []).append((tried, cell))
    return made


def _config(
    bench: Bench, data: str, skew: Skew, clients: int, seed: int, variant: Variant, rounds: int, more: Flat
) -> Config:
    shared = {**DEFAULTS, **bench.data[data], **bench.last}
    place = {"seed": seed, "partition.clients": clients, **skew.settings}
    flower = {"method": "fedavg", "flower.strategy": variant.method, "flower.rounds": rounds}
    own = flower if variant.flower else {"method": variant.method}
    flat = {**shared, **variant.settings, **bench.last, **more, **place}
    if variant.flower:  # of what it does not read, no other value makes another cell
        flat = {key: value for key, value in flat.items() if not key.startswith(methods.SERVER_PHASE)}
    flat = {**DEFAULTS, **flat, **own}
    try:
        if not variant.flower and not variant.own_uploads:
            _require_shared(Config.from_flat({**shared, **place}), {**variant.settings, **more}, variant)
        config = _least(flat) if variant.is_method else resolve(Config.from_flat(flat))
    except ConfigError as error:
        raise ConfigError(f"{error} (of {data}, {skew.name}, {clients} clients, {variant.label})") from error
    if config.evaluate.where != "server":
        raise ConfigError(f"evaluate.where = {config.evaluate.where!r}, but a bench evaluates on the server")
    return config


def _require_shared(base: Config, own: Flat, variant: Variant) -> None:
    """All one-shot methods have the same uploads, so none may have settings that change them."""
    known = base.to_flat()
    for key, value in own.items():
        changes = key.startswith(UPLOAD_SETTINGS) and key not in (*NARROWABLE, "data.validation")
        if changes and known.get(key) != value:
            raise ConfigError(
                f"{key} of {variant.label!r} changes the uploads that all share; set it in [settings], or give the "
                "method uploads of its own: own-uploads = true"
            )


def _least(flat: Flat) -> Config:
    """The config with no more extras than the method needs."""
    problems = []
    for extras in EXTRAS_LADDER:
        try:
            config = resolve(Config.from_flat({**flat, **extras}))
            methods.check(config, config.partition.clients)
        except ConfigError as error:
            problems.append(error)
        else:
            return config
    raise problems[0]

"""A bench's results by method and by place: what tables and figures are made from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any, NamedTuple

from .results import Entry, Results
from .stats import Spread, paired_p

# Not in the race: they keep K models, have real images, or have all data in one place.
REFERENCES = ("ensemble", "feddf", "central")
# These read the clients' statistics only; the weights are in the upload for the other methods.
WITHOUT_WEIGHTS = ("lda", "ridge", "fedpft")

ALONE = {"clients alone, mean": mean, "clients alone, best": max}


class Place(NamedTuple):
    """A column of the tables."""

    data: str
    clients: int
    partition: str


@dataclass(frozen=True)
class Row:
    """A method at one place, over the seeds."""

    place: Place
    name: str
    label: str
    rounds: int
    kind: str  # one-shot | flower | reference
    entries: tuple[Entry, ...]

    @cached_property
    def accuracy(self) -> Spread:
        return self._spread("student")

    @cached_property
    def worst(self) -> Spread | None:
        known = all(entry["accuracy"].get("worst_class") is not None for entry in self.entries)
        return self._spread("worst_class") if known else None

    def _spread(self, key: str) -> Spread:
        return Spread({entry["bench"]["seed"]: float(entry["accuracy"][key]) for entry in self.entries})

    def cost(self, key: str) -> float | None:
        """Mean over the seeds of a cost; of a list by client, the mean over the clients, too."""
        found = [value for entry in self.entries if (value := _cost(entry, key)) is not None]
        return mean(found) if found else None

    @property
    def recall(self) -> dict[str, float]:
        """By class, in percent, mean over the seeds that have images of it."""
        classes = dict.fromkeys(name for entry in self.entries for name in entry["accuracy"]["per_class"])
        found = {name: [entry["accuracy"]["per_class"].get(name) for entry in self.entries] for name in classes}
        known = {name: [value for value in values if value is not None] for name, values in found.items()}
        return {name: mean(values) for name, values in known.items() if values}


def _cost(entry: Entry, key: str) -> float | None:
    if key == "bytes_up" and entry["method"] in WITHOUT_WEIGHTS and "bytes_statistics" in entry:
        key = "bytes_statistics"
    value = (entry["peak_memory"] or {}).get(key) if key in ("ram", "gpu") else entry.get(key)
    if isinstance(value, list):
        known = [each for each in value if each is not None]
        return mean(known) if known else None
    return None if value is None else float(value)


def rows(results: Results) -> list[Row]:
    """One for each method and place, in the grid's order; then what the clients' models are alone."""
    found: dict[tuple[Place, str, int], list[Entry]] = {}
    for entry in results.entries:
        place = entry["bench"]
        found.setdefault((_place(entry), place["label"], place["rounds"]), []).append(entry)
    made = []
    for (place, label, rounds), (first, *others) in found.items():
        name, kind = label, first["bench"]["kind"]
        if kind == "flower":
            name = f"{label}, {rounds} round{'s' * (rounds > 1)}"
        elif first["method"] in REFERENCES:
            kind = "reference"
        made.append(Row(place, name, label, rounds, kind, (first, *others)))
    return [*made, *_alone(results.entries)]


def _place(entry: Entry) -> Place:
    place = entry["bench"]
    return Place(place["data"], place["clients"], place["partition"])


def _alone(entries: Iterable[Entry]) -> list[Row]:
    """The uploads without any method, from one entry of each place and seed that has evaluated them."""
    one: dict[tuple[Place, int], Entry] = {}
    for entry in entries:
        if any(value is not None for value in entry["accuracy"]["local"]):
            one.setdefault((_place(entry), entry["bench"]["seed"]), entry)
    made = []
    for name, of in ALONE.items():
        for place in dict.fromkeys(place for place, _ in one):
            of_place = [entry for (where, _), entry in one.items() if where == place]
            made.append(Row(place, name, name, 1, "reference", tuple(_only(entry, of) for entry in of_place)))
    return made


def _only(entry: Entry, of: Any) -> Entry:
    """The entry of a method that takes the mean, or the best, of the clients' models."""
    known = [value for value in entry["accuracy"]["local"] if value is not None]
    accuracy = {"student": of(known), "worst_class": None, "per_class": {}, "local": []}
    kept = {key: entry[key] for key in ("bench", "client_seconds", "config", "machine", "versions", "fingerprint")}
    empty = dict.fromkeys(("bytes_up", "bytes_down", "server_seconds", "peak_memory"))
    return {**kept, **empty, "method": "", "accuracy": accuracy}


def places(found: Sequence[Row]) -> list[Place]:
    """In order, each once."""
    return list(dict.fromkeys(row.place for row in found))


def reference_of(found: Sequence[Row], place: Place, label: str) -> Row | None:
    """The row that others of its place are tested against."""
    return next((row for row in found if row.place == place and row.label == label), None)


def p_value(row: Row, reference: Row | None) -> float | None:
    """Of a difference from the reference; None for the reference itself, and where nothing can be said."""
    if reference is None or row is reference:
        return None
    return paired_p(row.accuracy, reference.accuracy)

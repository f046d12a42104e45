"""Made-up results of a bench, for the tests of its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmitr_flwr.bench.results import Results
from fedmitr_flwr.config import Config

PLACES: Mapping[str, tuple[str, float | None]] = {
    "Dirichlet 0.1": ("dirichlet", 0.1),
    "Dirichlet 0.5": ("dirichlet", 0.5),
    "2 classes": ("classes-per-client", 2),
    "IID": ("iid", None),
}


def an_entry(
    label: str, accuracy: float, seed: int = 0, partition: str = "Dirichlet 0.1", rounds: int = 1, **changes: Any
) -> dict[str, Any]:
    """One finished cell: 4 clients of 1 and 3 MB up, two classes."""
    flower = label.startswith("flower:")
    scheme, value = PLACES[partition]
    place = {"data": "digits", "partition": partition, "scheme": scheme, "value": value, "clients": 4, "seed": seed}
    variant = {"label": label, "kind": "flower" if flower else "one-shot", "rounds": rounds}
    return {
        "method": label.removeprefix("flower:").partition("-")[0],
        "seed": seed,
        "accuracy": {
            "student": accuracy,
            "worst_class": accuracy - 10,
            "per_class": {"cat": accuracy + 10, "dog": accuracy - 10},
            "local": [] if flower else [20.0, None, 30.0, 40.0],
        },
        "bytes_up": [rounds * 1_000_000, rounds * 3_000_000],
        "bytes_down": [rounds * 2_000_000, None],
        "client_seconds": [rounds * 5.0, rounds * 15.0],
        "server_seconds": 2.0,
        "peak_memory": {"ram": 3_000_000_000, "gpu": None},
        "config": Config().to_flat() | {"model.img-size": 8},
        "machine": {"device": "cpu", "gpu": None, "cpu": "Abacus", "cores": 2, "platform": "Linux"},
        "versions": {"python": "3.11.7", "flwr": None},
        "fingerprint": "0123456789ab",
        "bench": {**place, **variant, "tuning": False, "tuned": None},
        **changes,
    }


def results(entries: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]] = ()) -> Results:
    return Results("fakes", "fedmitr", tuple(entries), tuple(missing))

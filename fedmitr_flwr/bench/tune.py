"""Settings chosen on validation images: by one seed that is not reported, all that was tried is kept."""

from collections.abc import Mapping

from .grid import Cell
from .spec import Flat
from .store import Store

Place = tuple[str, str, int]  # data set, label, rounds
Trials = Mapping[Place, list[tuple[Flat, Cell]]]
Choices = Mapping[Place, Mapping[str, object]]
Plan = tuple[int, str, list[Flat]]  # the seed, where, and what is tried in turn


def choose(trials: Trials, store: Store) -> dict[Place, dict[str, object]]:
    """What did best on the validation images; of equals, what was tried first.

    Returns:
        By place: `chosen` settings; `tried`, each with its accuracy (None: it failed); the tuning `seed`. Where all
        failed, the settings stay as they are.
    """
    found: dict[Place, dict[str, object]] = {}
    for place, tried in trials.items():
        results = [store.result(cell) for _, cell in tried]
        accuracies = [None if result is None else float(result["accuracy"]["student"]) for result in results]
        best = max((accuracy for accuracy in accuracies if accuracy is not None), default=None)
        chosen = {} if best is None else dict(tried[accuracies.index(best)][0])
        seed, where, settings = planned(tried)
        listed = [{**flat, "accuracy": accuracy} for flat, accuracy in zip(settings, accuracies, strict=True)]
        found[place] = {"chosen": chosen, "tried": listed, "seed": seed, "on": where}
    return found


def planned(tried: list[tuple[Flat, Cell]]) -> Plan:
    """What is to be tried, and on what: equal for equal trials."""
    cell = tried[0][1]
    where = f"{cell.data}, {cell.skew.name}, K {cell.clients}, validation images"
    return cell.seed, where, [flat for flat, _ in tried]

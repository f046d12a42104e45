"""Go on from results that were made elsewhere: their cells are finished, and what was chosen there is chosen.

A committed results.jsonl holds no uploads and no code; who names it vouches for the code that made it, which every
result, and so the table, still names.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..common.files import write_text
from ..config.earlier import upgraded
from .grid import Cell
from .results import Results
from .spec import Flat
from .store import Store
from .tune import Choices, Place, Plan, Trials, planned

_CHANGES = ("tuned", "tuning")  # of a cell's facts: not its place in the grid
_OF_TRIALS = ("seed", "partition.", "data.validation")  # in which a trial differs from the cells that it is for


def chosen_in(known: Results, trials: Trials) -> Choices:
    """The choices that these results already tell, if the same was tried on the same seed, all else being equal."""
    choices: dict[Place, Mapping[str, object]] = {}
    for entry in known.entries:
        about = entry["bench"]
        tuned = _respelled(about["tuned"], entry["config"])
        place = about["data"], about["label"], about["rounds"]
        if tuned and tuned["chosen"] and place in trials and _tried(tuned) == planned(trials[place]):
            _, trial = trials[place][0]
            if trial.is_of(entry["config"], but=(*tuned["chosen"], *_OF_TRIALS)):
                choices[place] = tuned
    return choices


def _respelled(tuned: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was tried and chosen, as settings are called today."""
    if not tuned:
        return None
    strategy = {"flower.strategy": config.get("flower.strategy")}

    def today(flat: Mapping[str, Any]) -> Flat:
        return {key: value for key, value in upgraded({**flat, **strategy}).items() if key not in strategy}

    chosen = today(tuned["chosen"]) if tuned["chosen"] else tuned["chosen"]
    return {**tuned, "chosen": chosen, "tried": [today(one) for one in tuned["tried"]]}


def _tried(tuned: Mapping[str, Any]) -> Plan:
    settings: list[Flat] = [{key: value for key, value in one.items() if key != "accuracy"} for one in tuned["tried"]]
    return tuned["seed"], tuned["on"], settings


def adopt(known: Results, grid: Iterable[Cell], store: Store) -> None:
    """Put each result into the folder of its cell, unless it has one: equal in place and all settings."""
    by_place = {_place(entry["bench"]): entry for entry in known.entries}
    for cell in grid:
        entry = by_place.get(_place(cell.facts))
        if entry and cell.is_of(entry["config"]) and store.result(cell) is None:
            result = {key: value for key, value in entry.items() if key != "bench"}
            result["config"] = cell.in_force  # the same, with the paths that the file leaves out
            folder = store.place(cell)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")


def _place(facts: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(value for key, value in sorted(facts.items()) if key not in _CHANGES)

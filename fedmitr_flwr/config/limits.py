"""Limits of settings, checked by name: the base of every section."""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..common import outside
from ..common.errors import ConfigError

SEPARATOR = "|"  # of names in one setting: names of classes hold commas


def check(key: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r} is not possible; use {wanted}")


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest choice if one is near, where the value is none of the choices."""
    choices = list(choices)
    if value not in choices:  # only then: to find the nearest takes longer than all other checks
        check(key, value, False, " | ".join(choice or '""' for choice in choices) + nearest(value, choices))


def nearest(value: str, choices: Iterable[str]) -> str:
    """The end of a line: the choice that was meant perhaps, or nothing."""
    near = difflib.get_close_matches(value.lower(), list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Shared checks. Subclasses are frozen dataclasses of bool, int, float and str fields."""

    section = ""

    def key(self, name: str) -> str:
        """The setting of a field: `local.batch-size` of `batch_size`."""
        return f"{self.section}.{name}".lstrip(".").replace("_", "-")

    def _one_of(self, name: str, *choices: str) -> None:
        one_of(self.key(name), getattr(self, name), choices)

    def _one_of_or_outside(self, name: str, group: str, *choices: str) -> None:
        """Or a Python file, or an entry point of the group `fedmitr_flwr.<group>`."""
        value = getattr(self, name)
        if not outside.is_file(value) and value not in choices:
            known = [*choices, *outside.names(group)]
            if value not in known:
                wanted = f"{' | '.join(known)}, or the path of a .py file{nearest(value, known)}"
                check(self.key(name), value, False, wanted)

    def _at_least(self, low: float, *names: str) -> None:
        self._all(names, lambda value: value >= low, f"a number >= {low}")

    def _above(self, low: float, *names: str) -> None:
        self._all(names, lambda value: value > low, f"a number > {low}")

    def _within(self, low: float, high: float, *names: str) -> None:
        self._all(names, lambda value: low <= value <= high, f"a number from {low} to {high}")

    def _all(self, names: Iterable[str], fits: Callable[[float], bool], wanted: str) -> None:
        for name in names:
            value = getattr(self, name)
            check(self.key(name), value, fits(value), wanted)

    def _names(self, name: str) -> tuple[str, ...]:
        """The names in a setting such as "cat | dog"; none in an empty one."""
        value = getattr(self, name)
        found = tuple(part.strip() for part in value.split(SEPARATOR)) if value.strip() else ()
        good = all(found) and len(set(found)) == len(found)
        check(self.key(name), value, good, "different names, separated by |, such as 'cat | dog'")
        return found


def needed(quorum: float, clients: int) -> int:
    """How many of so many clients a quorum asks for; a product like 0.56 * 25 = 14.000000000000002 is 14."""
    return max(1, math.ceil(round(quorum * clients, 6)))

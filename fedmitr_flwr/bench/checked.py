"""Values of a bench file, checked one by one; every refusal names the key, the value and the fix."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..common.errors import ConfigError
from ..config.limits import nearest


def require_known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown key '{where}{key}'{_hint(key, known, where)}")


def _hint(value: str, known: Iterable[str], where: str = "") -> str:
    near = nearest(value, known := list(known))
    return near.replace("mean ", f"mean {where}") or f"; use one of: {', '.join(where + name for name in known)}"


def require_one_of(value: str, known: Iterable[str], where: str, more: str = "") -> str:
    if value not in (known := list(known)):
        raise ConfigError(f"{where}: {value!r} is unknown{_hint(value, known)}{more}")
    return value


def as_table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {value!r} is not possible; make it a table [{where}]")
    return value


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where} = {value!r} is not possible; use text (in quotes)")
    return value


def as_list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} = {value!r} is not possible; use a list with one entry at least")
    if any(entry in value[:place] for place, entry in enumerate(value)):
        raise ConfigError(f"{where} = {value!r} has an entry twice; remove one")
    return value


def as_texts(value: object, where: str) -> tuple[str, ...]:
    return tuple(as_text(entry, where) for entry in as_list(value, where))


def as_number(number: Any, where: str, kind: type, low: float, *, open_end: bool = False) -> Any:
    fits = type(number) is kind or (kind is float and type(number) is int)
    if not fits or number < low or (open_end and number == low):
        name = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{where}: {number!r} is not possible; use {name} {'>' if open_end else '>='} {low}")
    return kind(number)


def as_numbers(value: object, where: str, kind: type, low: float, *, open_end: bool = False) -> tuple[Any, ...]:
    return tuple(as_number(number, where, kind, low, open_end=open_end) for number in as_list(value, where))


def quoted(label: str) -> str:
    return label if label.replace("-", "").replace("_", "").isalnum() else f'"{label}"'

"""Settings as text: TOML documents and `key=value` words to flat tables and back, and the check of a value's type."""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, unread


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested tables to dotted keys, as Flower does."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def parse_toml(text: str) -> dict[str, object]:
    """A TOML document as `{"local.batch-size": 32, ...}`; keys and values are not checked yet."""
    try:
        return flatten(tomllib.loads(text))
    except ValueError as error:  # tomllib's own, and Python's for an integer of thousands of digits
        raise ConfigError(f"not valid TOML: {error}") from error


def read_flat(path: Path) -> dict[str, object]:
    """`parse_toml` of a file.

    Raises:
        ConfigError: the file, which is named, cannot be read or is not TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(unread("config file", path, error)) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def parse_assignment(text: str) -> tuple[str, object]:
    """One `key=value` of a command line; the value is TOML, or else taken as a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not of the form key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except ValueError:
        return key.strip(), value.strip()
    # A line break in the text would have begun a second key: then the text is no TOML value.
    return key.strip(), parsed["value"] if len(parsed) == 1 else value.strip()


def typed(key: str, value: object, known: Mapping[str, object]) -> object:
    """`value` as the type of the default; a bool is no int, an int is a fine float."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "the keys are listed in pyproject.toml, [tool.flwr.app.config]"
        raise ConfigError(f"unknown config key {key!r}; {hint}")
    wanted = type(known[key])
    if wanted is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not wanted:
        given = _GIVEN.get(type(value), f"a {type(value).__name__}")
        raise ConfigError(f"{key} = {value!r} is {given}; it must be {_WANTED[wanted]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r} is not a finite number")
    if isinstance(value, str) and not _is_unicode(value):
        raise ConfigError(f"{key} = {value!r} is not valid Unicode text; rename what it names")
    return value


_GIVEN = {bool: "a truth value", int: "a whole number", float: "a decimal number", str: "text"}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text (in quotes)"}


def _is_unicode(text: str) -> bool:
    """Lone surrogates stand for undecodable bytes of a command line; no TOML file can hold them."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)

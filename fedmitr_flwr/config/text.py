"""Settings as text: TOML documents and `key=value` words to flat tables and back, and the check of a value's type."""

import codecs
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError, unread
from ..common.outside import is_file
from .earlier import refuse_earlier
from .limits import SEPARATOR

# Settings that are paths, with their values that are none. A relative one is relative to the file that says it; on the
# command line, to the current folder.
PATHS: Mapping[str, tuple[str, ...]] = {
    "out-dir": (),
    "resume-from": (),
    "data.path": (),
    "feddf.path": (),
    "model.weights": ("none", "timm"),
}
# Of these, what says where a run is kept and no more.
PLACES = ("out-dir", "resume-from")
# Settings that may name a Python file in place of one of their choices; then they are paths, too.
OUTSIDE = ("method", "ensemble.combine", "inversion.prior")

# Text settings that are true, false, or left to be chosen.
THREE_WAY = ("data.flip",)

# What other libraries call a setting. One with a dot is a whole key.
_ALSO_CALLED = {
    "arch": "model.name",
    "architecture": "model.name",
    "backbone": "model.name",
    "batch": "batch-size",
    "bs": "batch-size",
    "channels": "in-chans",
    "cuda": "device",
    "dataset": "data.source",
    "dirichlet": "partition.alpha",
    "dirichlet-alpha": "partition.alpha",
    "gpu": "device",
    "image-size": "img-size",
    "in-channels": "in-chans",
    "iterations": "steps",
    "learning-rate": "lr",
    "n-classes": "num-classes",
    "n-clients": "partition.clients",
    "n-epochs": "epochs",
    "num-channels": "in-chans",
    "num-clients": "partition.clients",
    "num-epochs": "epochs",
    "num-rounds": "flower.rounds",
    "num-steps": "steps",
    "num-supernodes": "partition.clients",
    "optimiser": "optimizer",
    "output": "out-dir",
    "output-dir": "out-dir",
    "patch": "patch-size",
    "random-seed": "seed",
    "resolution": "img-size",
    "resume": "resume-from",
}


def spelled(key: str) -> str:
    """A key as the settings spell it: `local.batch_size` is `local.batch-size`."""
    return key.strip().replace("_", "-")


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested tables to dotted keys, as Flower does.

    Raises:
        ConfigError: a key is there in two spellings.
    """
    flat: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + spelled(name)
        inner = flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
        if twice := sorted(flat.keys() & inner.keys()):
            raise ConfigError(f"{twice[0]} is there twice; remove one of the two")
        flat |= inner
    return flat


def parse_toml(text: str) -> dict[str, object]:
    """A TOML document as `{"local.batch-size": 32, ...}`; keys and values are not checked yet."""
    return flatten(_document(text))


def _document(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # tomllib's own, and Python's for an integer of thousands of digits
        hint = "; truth values are true and false, in lower case" if re.search(r"=\s*(True|False)\b", text) else ""
        raise ConfigError(f"not valid TOML: {error}{hint}") from error


def read_document(path: Path, what: str = "config file") -> dict[str, Any]:
    """A TOML file as nested tables. A byte order mark, which Windows editors write, is passed over.

    Raises:
        ConfigError: the file, which is named, cannot be read or is not TOML in UTF-8.
    """
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ConfigError(f"the {what} {path} is text in UTF-16; save it as UTF-8")
        if b"\0" in content:
            raise ConfigError(f"the {what} {path} is a binary file; give the path of one in TOML")
        text = content.decode("utf-8-sig")
    except IsADirectoryError as error:
        raise ConfigError(f"the {what} {path} is a folder; give the path of a file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(unread(what, path, error)) from error
    try:
        return _document(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_flat(path: Path) -> dict[str, object]:
    """A file of settings as `parse_toml` gives them; paths in it are as the file says them (see `read_settings`).

    Raises:
        ConfigError: the file, which is named, cannot be read, is not TOML, or is a bench file.
    """
    document = read_document(path)
    if isinstance(document.get("grid"), Mapping):
        raise ConfigError(f"{path} is a bench file, with a [grid]; run it by: fedmitr bench {path}")
    try:
        return flatten(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_settings(file: Path | None, words: Sequence[str], known: Mapping[str, object]) -> dict[str, object]:
    """The settings of a file under the `key=value` words of a command line, which win, with every path absolute.

    Relative paths are relative to the file's folder or to the current one. `known` are all settings, with defaults.

    Raises:
        ConfigError: the file cannot be read, or a word is no setting. Other keys and values are not checked yet.
    """
    assigned = dict(parse_assignment(word, known) for word in words)
    of_file = read_flat(file) if file else {}
    source = (of_file | assigned).get("data.source", known["data.source"])
    from_file = located(of_file, file.expanduser().absolute().parent, source) if file else {}
    return from_file | located(assigned, Path.cwd(), source)


def located(flat: Mapping[str, object], folder: Path, source: object = None) -> dict[str, object]:
    """The same settings, whose relative paths are taken as relative to `folder`.

    With the source `hub` (default: these settings' own), `data.path` is a data set's name unless there is such a path.
    """
    source = flat.get("data.source") if source is None else source
    found = dict(flat)
    for key, value in flat.items():
        if key not in PATHS and not (is_file(value) and key in OUTSIDE):
            continue
        if not isinstance(value, str) or not value or value in PATHS.get(key, ()):
            continue
        path = Path(os.path.normpath(folder / Path(value).expanduser()))
        if not (key == "data.path" and source == "hub" and not _exists(path)):
            found[key] = str(path)
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no path at all: a name that is too long, a null character
        return False


def toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def parse_assignment(text: str, known: Mapping[str, object] | None = None) -> tuple[str, object]:
    """One `key=value` of a command line.

    The value is TOML, or what Python has for it (True, .5), or else text. Of a setting whose default in `known` is
    text, everything is text but a quoted string and a list: `data.path=2024-01-31` is a folder and no date.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        file = text.lower().endswith(".toml")
        fix = f"; for a file of settings write: -c {text}" if file else "; write it without spaces: local.lr=0.01"
        raise ConfigError(f"{text!r} is not of the form key=value{fix}")
    key, value = spelled(key), value.strip()
    marks = "\"'" if key in PATHS else "\"'["
    if isinstance((known or {}).get(key), str) and not value.startswith(tuple(marks)):
        return key, value
    return key, _parsed(value)


def _parsed(value: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {value}")
        # A line break in the text would have begun a second key: then the text is no TOML value.
        return parsed["value"] if len(parsed) == 1 else value
    except ValueError:
        if value in ("True", "False"):
            return value == "True"
        return float(value) if _PYTHON_FLOAT.fullmatch(value) else value


_PYTHON_FLOAT = re.compile(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # which TOML does not have


def typed(key: str, value: object, known: Mapping[str, object]) -> object:
    """`value` as the type of the default.

    A bool is no int; an int is a fine float, and a float without a fraction a fine int (1e3). Text settings take a
    number or a list, true and false their names as text.
    """
    if key not in known:
        refuse_earlier(spelled(key))
        raise ConfigError(f"unknown config key {key!r}; {key_hint(key, known, value)}")
    wanted = type(known[key])
    value = value if key in PATHS and isinstance(value, list) else _converted(value, wanted)
    if key in THREE_WAY and isinstance(value, bool | str):  # on a command line also as Python writes it: True
        value = str(value).lower()
    if type(value) is not wanted:
        given = _GIVEN.get(type(value), f"a {type(value).__name__}")
        raise ConfigError(f"{key} = {_short(value)} is {given}; it must be {_WANTED[wanted]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r} is not a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key} = {_short(value)} is not possible; use a whole number of at most 64 bits")
    # Lone surrogates stand for undecodable bytes of a command line; no TOML file can hold them.
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{key} = {value!r} is not valid Unicode text; rename what it names")
    return value


def _converted(value: object, wanted: type) -> object:
    """The value as the wanted type where nothing is lost by it; else the value itself."""
    if wanted is float and type(value) is int:
        return float(value) if abs(value) < 1e300 else math.inf
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if wanted is str and type(value) in (int, float):
        return str(value)
    if wanted is str and isinstance(value, list):
        if all(type(entry) in (int, float) for entry in value):
            return ",".join(map(str, value))
        if all(isinstance(entry, str) and SEPARATOR not in entry for entry in value):
            return f" {SEPARATOR} ".join(value)
    return value


def _short(value: object) -> str:
    """A value as a message shows it; Python does not print an integer of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "an integer of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_GIVEN = {bool: "a truth value", int: "a whole number", float: "a decimal number", str: "text"}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text (in quotes)"}


def key_hint(key: str, known: Mapping[str, object], value: object = None) -> str:
    """The end of a line on an unknown key: every setting that may be meant, best by its last part."""
    own = [other for other in known if other.startswith(f"{spelled(key)}.")]
    if own and not _ending(spelled(key), known):
        return f"it is a section, whose settings are: {', '.join(own)}"
    if fits := keys_like(key, known, value):
        return f"did you mean {' or '.join(filter(None, (', '.join(fits[:-1]), fits[-1])))}?"
    return "`fedmitr config` lists all keys"


def keys_like(key: str, known: Mapping[str, object], value: object = None) -> list[str]:
    """The settings that may be meant by a key, those that can have the value if there are any."""
    key = spelled(key).lower()
    section, _, last = key.rpartition(".")
    fits = _ending(last, known)
    if any(other.rpartition(".")[2] == last for other in fits):  # epochs: epochs-per-round, too
        fits += [other for other in known if other.rpartition(".")[2].startswith(f"{last}-")]
    if section and fits:
        sections = {other.rpartition(".")[0] for other in known}
        section = next(iter(difflib.get_close_matches(section, sections, n=1)), section)
        own = [other for other in fits if other.startswith(f"{section}.")]
        fits = own or difflib.get_close_matches(key, fits, n=1, cutoff=0.85) or fits
    fits = fits or [other for other in known if other.startswith(f"{key}-")]
    fits = fits or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not fits:
        lasts = dict.fromkeys([*(other.rpartition(".")[2] for other in known), *_ALSO_CALLED])
        near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)
        fits = [full for part in near for full in _ending(part, known)]
    return [other for other in fits if _possible(value, type(known[other]))] or fits


def _possible(value: object, wanted: type) -> bool:
    """Whether a value may have been meant for a setting of this type: text takes a number, too, but is not likely."""
    return isinstance(value, str | list) if wanted is str else type(_converted(value, wanted)) is wanted


def _ending(last: str, known: Mapping[str, object]) -> list[str]:
    """Settings with this last part, or with what it is called here; hyphens do not count."""

    def plain(text: str) -> str:
        return text.replace("-", "")

    also = next((ours for theirs, ours in _ALSO_CALLED.items() if plain(theirs) == plain(last)), last)
    exact = [key for key in known if plain(key.rpartition(".")[2]) == plain(last)]
    return exact or [key for key in known if key == also or key.rpartition(".")[2] == also]


def option_hint(word: str, following: Sequence[str], known: Mapping[str, object]) -> str:
    """The end of a line on an unknown option `--seed`, or `--seed=1`: the setting that it stands for, if it does."""
    name, equals, value = word.lstrip("-").partition("=")
    key = spelled(name)
    if not equals:
        value = following[0] if following and not following[0].startswith("-") and "=" not in following[0] else "..."
    fits = [key] if key in known else _ending(key.rpartition(".")[2], known)
    fits = [one for one in fits if _possible(_parsed(value), type(known[one]))] or fits
    if len(word) < 3 or not fits:
        return ""
    return f"; settings are words of the form key=value: {' or '.join(f'{one}={value}' for one in fits[:3])}"

"""The settings as a JSON schema, by which editors complete and check their TOML files (taplo, Even Better TOML)."""

import functools
from collections.abc import Mapping
from typing import Any

from ..common import outside
from .config import Config
from .described import comments, methods
from .limits import Section
from .text import PATHS, THREE_WAY

Schema = dict[str, Any]
_FILE: Schema = {"type": "string", "pattern": r"\.py$"}
_TYPES = {bool: "boolean", int: "integer", float: "number"}


def schema() -> Schema:
    """All settings with their defaults, descriptions and limits, a table for each section.

    A limit that several settings have together is not in it: the program says these.
    """
    top: Schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Settings of fedmitr"}
    top |= {"type": "object", "additionalProperties": False, "properties": {}}
    for key, value in Config().to_flat().items():
        section, _, name = key.rpartition(".")
        table = top["properties"]
        if section:
            empty = {"type": "object", "additionalProperties": False, "properties": {}}
            table = table.setdefault(section, empty)["properties"]
        table[name] = {"description": comments()[key], "default": value, **_type(key, value), **limits().get(key, {})}
    return top


def _type(key: str, value: object) -> Schema:
    """Free text may be given as a number or a list, too; see `text.typed`."""
    if type(value) in _TYPES:
        return {"type": _TYPES[type(value)]}
    return {} if key in limits() else {"type": "string" if key in PATHS else ["string", "number", "array"]}


@functools.cache
def limits() -> Mapping[str, Schema]:
    """What each section checks of its settings one by one, by key."""
    found: dict[str, Schema] = {"method": {"anyOf": [{"enum": list(methods())}, _FILE]}}

    def note(self: Section, names: tuple[str, ...], **limit: object) -> None:
        for name in names:
            found.setdefault(self.key(name), {}).update(limit)

    def choices(self: Section, name: str, *allowed: str) -> None:
        also = [True, False] if self.key(name) in THREE_WAY else []
        note(self, (name,), enum=[*allowed, *also])

    def outside_too(self: Section, name: str, group: str, *allowed: str) -> None:
        note(self, (name,), anyOf=[{"enum": [*allowed, *outside.names(group)]}, _FILE])

    recorders = {
        "_one_of": choices,
        "_one_of_or_outside": outside_too,
        "_at_least": lambda self, low, *names: note(self, names, minimum=low),
        "_above": lambda self, low, *names: note(self, names, exclusiveMinimum=low),
        "_within": lambda self, low, high, *names: note(self, names, minimum=low, maximum=high),
    }
    config = Config()
    for section in (config, *vars(config).values()):
        if isinstance(section, Section):
            type("Recorder", (type(section),), recorders)()  # its checks tell what they would have checked
    return found

"""Every setting with its value and what the comment behind its field says, as lines of TOML."""

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..common import outside
from ..common.errors import ConfigError
from ..common.shipped import PACKAGE
from .config import Config
from .text import key_hint, spelled, toml_value

Value = bool | int | float | str


def methods() -> dict[str, str]:
    """The first line of each method's description, by name; the files are read, not run. Installed ones are named."""
    found = dict.fromkeys(outside.names("methods"), "(of an installed package)")
    for path in (PACKAGE / "methods").glob("[!_]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "fuse" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return dict(sorted(found.items()))


@functools.cache
def comments() -> Mapping[str, str]:
    """What stands behind each field of the config classes, by key."""
    found: dict[str, str] = {}
    for name in ("config.py", "sections.py"):
        source = Path(__file__).with_name(name).read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            section = ""
            for line in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "section":
                    section = f"{ast.literal_eval(line.value)}."
                elif isinstance(line, ast.AnnAssign):
                    key = f"{section}{ast.unparse(line.target)}".replace("_", "-")
                    found[key] = lines[line.lineno - 1].partition("  # ")[2]
    return found


def table(values: Mapping[str, Value], start: str = "") -> Iterator[str]:
    """Lines of TOML with a table for each section, whose headers begin with `start`."""
    before = None
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section != before and (start or section):
            yield ("" if before is None else "\n") + f"[{'.'.join(filter(None, (start, section)))}]"
        before = section
        yield _line(name, value, comments()[key])


def settings_like(words: Iterable[str], search: str | None = None) -> Iterator[str]:
    """The default of each setting that is named by key or by section, or that `search` is in; of all without any.

    Raises:
        ConfigError: a word is neither a key nor a section, or nothing is found.
    """
    known = Config().to_flat()
    wanted = [spelled(word) for word in words]
    sections = {key.rpartition(".")[0] for key in known}
    for word in wanted:
        if word not in known and word not in sections:
            raise ConfigError(f"there is no setting or section {word!r}; {key_hint(word, known)}")
    found = [key for key in known if not wanted or key in wanted or key.rpartition(".")[0] in wanted]
    if search is not None:
        found = [key for key in found if search.lower() in f"{key} {comments()[key]}".lower()]
    if not found:
        raise ConfigError(f"nothing about {search!r} in the settings; `fedmitr config` lists them all")
    for key in found:
        yield _line(key, known[key], comments()[key])


def difference(one: Config, other: Config) -> Iterator[str]:
    """Settings that two runs have otherwise."""
    second = other.to_flat()
    for key, value in one.to_flat().items():
        if value != second[key]:
            yield f"{key} = {toml_value(value)} | {toml_value(second[key])}"


def _line(name: str, value: Value, comment: str) -> str:
    return f"{name} = {toml_value(value)}" + (f" # {comment}" if comment else "")

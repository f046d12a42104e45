"""The documents against the code: functions they name exist, defaults they state hold, links lead somewhere."""

import re
from functools import reduce
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest

from fedmitr_flwr.config import Config
from fedmitr_flwr.config.earlier import RENAMED, RETIRED
from fedmitr_flwr.config.text import parse_assignment

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "docs" / "fedmitr.md"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").glob("*.md")),
]
# What was tried, decided and measured, by the settings of that day.
RECORDS = ("CHANGELOG.md", "docs/adr/", "docs/benchmark.md")

_FUNCTION = re.compile(r"`([\w/]+)\.py:([\w.]+)`")
_ROW = re.compile(r"^\| `([a-z]+\.[a-z-]+)` \| (`?)([^|`]+)\2 \|", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_KEY = re.compile(r"\b([a-z]+(?:-[a-z]+)?\.[a-z][a-z-]*[a-z])\b")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_function_that_the_method_s_document_names_exists() -> None:
    named = _FUNCTION.findall(METHOD.read_text(encoding="utf-8"))
    assert len(named) >= 20
    for file, name in named:
        module = import_module(f"fedmitr_flwr.{file.replace('/', '.')}")
        assert callable(reduce(getattr, name.split("."), module)), f"{file}.py:{name}"


def test_every_default_in_the_method_s_document_is_the_code_s() -> None:
    rows = _ROW.findall(METHOD.read_text(encoding="utf-8").partition("## 5.")[2])
    defaults = Config().to_flat()
    assert len(rows) >= 20
    stated = {
        key: value.strip() if quoted else parse_assignment(f"v={value.strip()}")[1] for key, quoted, value in rows
    }
    assert stated == {key: defaults[key] for key in stated}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_relative_links_resolve(path: Path) -> None:
    for link, image in _LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = (link or image).partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        there = (path.parent / unquote(target)).resolve() if target else path
        assert there.exists(), f"{link or image} of {path.name}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{link} of {path.name}"


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "LOG.md"], ids=named)
def test_every_config_key_exists(path: Path) -> None:
    """But in the log, and in tables that are made from results: these have the settings of their day."""
    known = set(Config().to_flat())
    if named(path).startswith(RECORDS):
        known |= RETIRED.keys() | RENAMED.keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    past = r"https?://\S+|```(?:python|console)\n.*?```|<!-- (\w+) -->.*?<!-- /\1 -->"
    text = re.sub(past, "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for key in _KEY.findall(text):
        section, _, leaf = key.partition(".")
        if section in sections and leaf not in ("py", "md", "toml", "safetensors", "json", "png", "jsonl", "parquet"):
            assert key in known, f"{key} of {path.name}"

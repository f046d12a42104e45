"""The science does without the framework: `fedmitr_flwr` imports neither flwr nor ray."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "fedmitr_flwr").rglob("*.py"))
FRAMEWORK = "flwr|ray|server_app|client_app"


def test_no_file_imports_the_framework() -> None:
    """Neither where it begins nor within a function."""
    statement = rf"^\s*(import|from) ({FRAMEWORK})\b|import_module\(.({FRAMEWORK})\b"
    assert not [path for path in FILES if re.search(statement, path.read_text(encoding="utf-8"), re.MULTILINE)]
    for line in ("    from flwr.app import Message", "import ray", 'importlib.import_module("client_app.app")'):
        assert re.search(statement, line)


def test_no_two_folders_import_each_other_in_a_circle() -> None:
    """Of the package's folders and top modules, each imports only such as come before it in some order."""
    root = ROOT / "fedmitr_flwr"
    wanted: dict[str, set[str]] = {}
    for path in FILES:
        parts = path.relative_to(root).with_suffix("").parts
        own = wanted.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                own |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    for own, names in wanted.items():
        names.intersection_update(wanted.keys() - {own})
    assert sum(map(len, wanted.values())) > 50  # the test looks where there is something to see
    tuple(TopologicalSorter(wanted).static_order())  # raises CycleError, which names the circle
    assert {path.parent for path in FILES} == {path.parent for path in root.rglob("__init__.py")}

"""The science does without the framework: `fedmitr_flwr` imports neither flwr nor ray."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "fedmitr_flwr").rglob("*.py"))
FORBIDDEN = {"flwr", "ray", "server_app", "client_app"}

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # importing it raises ImportError
import fedmitr_flwr
count = 0
for module in pkgutil.walk_packages(fedmitr_flwr.__path__, "fedmitr_flwr."):
    importlib.import_module(module.name)
    count += 1
print(count)
"""


def imported(tree: ast.AST) -> Iterator[str]:
    """The first parts of all absolute imports in a file, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(ast.literal_eval(a)).partition(".")[0] for a in node.args if isinstance(a, ast.Constant))


def test_the_finder_finds_imports() -> None:
    source = "import a.b, c\ndef f():\n    from d.e import x\n    importlib.import_module('g.h')\nfrom .i import j\n"
    assert set(imported(ast.parse(source))) == {"a", "c", "d", "g"}


def test_no_file_imports_the_framework() -> None:
    forbidden = {path: FORBIDDEN & set(imported(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}
    assert not {path.relative_to(ROOT): names for path, names in forbidden.items() if names}


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


def test_every_module_imports_without_the_framework() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, "flwr", "ray"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # walk_packages does not count the top package itself.
    assert int(done.stdout) == len(FILES) - 1, "a folder without __init__.py?"

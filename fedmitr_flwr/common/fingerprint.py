"""Which code is this? The two sides of a run must agree on it."""

import ast
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .shipped import INSIDE, PACKAGE, shipped

# Folders and modules that look at results and make none: a change there leaves every number as it is.
_METHODS = "methods/"  # each a file of its own: another method's is no part of what ran
_SHARED = ("methods/__init__.py", "methods/contract.py")
_ABOUT_RESULTS = (
    *("bench/", "report/", "publish/", "diagnostics/", "api/", "flower/"),
    *("cli.py", "__main__.py", "common/progress.py", "common/shipped.py", "config/described.py", "config/presets.py"),
)


@cache
def fingerprint() -> str:
    """12 hexadecimal characters over the paths and contents of this package's modules.

    Only what Flower would put into an app bundle counts, so a checkout and the bundle made from it agree.
    """
    return _of_folder(PACKAGE)


@cache
def core() -> str:
    """The same over the modules that can change a number whatever the method.

    What starts, draws and reports experiments is left out, and so are the methods.
    """
    return _core_of(PACKAGE)


@cache
def of_method(method: str) -> str:
    """`core` with the method's own file, and with those of the methods that it imports."""
    return _of_method(PACKAGE, method)


@cache
def of_flower() -> str:
    """`core` with the two apps, which have the values that Flower's strategies get where no setting says otherwise."""
    return _with_apps(core(), shipped)


def changed() -> bool:
    """Whether the code on disk, which a new process would run, is no longer that of this process's first question."""
    before = of_flower()
    return _with_apps(_core_of(PACKAGE), shipped) != before


def _core_of(package: Path) -> str:
    return _of_folder(package, (*_ABOUT_RESULTS, _METHODS), _SHARED)


def _of_method(package: Path, method: str) -> str:
    folder = package / _METHODS
    own = Path(method) if method.endswith(".py") else folder / f"{method}.py"
    found: dict[Path, bytes] = {}
    todo = [own]
    while todo:
        path = todo.pop()
        if path not in found and path.is_file():  # else an entry point of a package, which has a version of its own
            found[path] = path.read_bytes()
            todo += [folder / f"{name}.py" for name in _imported(found[path])]
    parts = [_core_of(package), "" if found else method]
    parts += sorted(hashlib.sha256(content).hexdigest() for content in found.values())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _imported(source: bytes) -> set[str]:
    """The last parts of all names that are imported, among which are the modules of other methods."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names}
    return found


def _with_apps(code: str, place: Callable[[str], Path]) -> str:
    parts = [code, *(_of_folder(place(app)) for app in ("server_app", "client_app"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _of_folder(root: Path, without: tuple[str, ...] = (), but: tuple[str, ...] = ()) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)  # editors' backups and locks
        test = path.stem.startswith("test_") or path.stem.endswith("_test")  # not bundled by Flower
        left_out = relative.as_posix().startswith(without) and relative.as_posix() not in but
        if not hidden and not test and not left_out and relative.parts[0] != INSIDE:
            content = path.read_bytes()
            digest.update(f"{relative.as_posix()}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]

"""Which code is this? The two sides of a run must agree on it."""

import hashlib
from functools import cache
from pathlib import Path

# Folders and modules that look at results and make none: a change there leaves every number as it is.
_ABOUT_RESULTS = ("bench/", "report/", "cli.py", "__main__.py", "common/progress.py")
_PACKAGE = Path(__file__).parents[1]


@cache
def fingerprint() -> str:
    """12 hexadecimal characters over the paths and contents of this package's modules.

    Only what Flower would put into an app bundle counts, so a checkout and the bundle made from it agree.
    """
    return _of_folder(_PACKAGE)


@cache
def core() -> str:
    """The same over the modules that can change a number: what runs, draws and tells of experiments is left out."""
    return _of_folder(_PACKAGE, _ABOUT_RESULTS)


@cache
def of_flower() -> str:
    """`core` with the two apps, which have the values that Flower's strategies get where no setting says otherwise."""
    return _with_apps(core(), _PACKAGE.parent)


def changed() -> bool:
    """Whether the code on disk, which a new process would run, is no longer that of this process's first question."""
    before = of_flower()
    return _with_apps(_of_folder(_PACKAGE, _ABOUT_RESULTS), _PACKAGE.parent) != before


def _with_apps(code: str, beside: Path) -> str:
    parts = [code, *(_of_folder(beside / app) for app in ("server_app", "client_app"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _of_folder(root: Path, without: tuple[str, ...] = ()) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)  # editors' backups and locks
        test = path.stem.startswith("test_") or path.stem.endswith("_test")  # not bundled by Flower
        if not hidden and not test and not relative.as_posix().startswith(without):
            content = path.read_bytes()
            digest.update(f"{relative.as_posix()}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
